//! Reads the signatures of `kernels/*.metal` and writes a Rust launcher for each kernel: a launcher cannot forget a buffer, nor
//! whether a kernel writes it. A file that begins with `// Matrix units of Metal.` is for Metal alone, and for the emulator.

use std::{
    collections::BTreeSet,
    env,
    error::Error,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    let folder = Path::new("kernels");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "metal"));
    files.sort();
    let mut code = String::new();
    let mut structs = BTreeSet::new();
    // what every device compiles, then what is for Metal alone
    let mut names = [String::new(), String::new()];
    let mut texts = [String::new(), String::new()];
    for path in &files {
        let file = path.file_name().and_then(|name| name.to_str()).ok_or("a kernel file's name is not UTF-8")?;
        let text = fs::read_to_string(path)?;
        let kind = usize::from(text.starts_with("// Matrix units of Metal."));
        writeln!(texts[kind], "    ({file:?}, include_str!({:?})),", path.canonicalize()?)?;
        for kernel in kernels_of(&text).map_err(|e| format!("{}: {e}", path.display()))? {
            // kernels of a file may share their parameters
            if structs.insert((kernel.params.to_owned(), file.to_owned())) {
                kernel.write_params(&mut code)?;
            }
            kernel.write(file, &mut code)?;
            write!(names[kind], "&{}, ", kernel.name.to_uppercase())?;
        }
    }
    for (kind, prefix, which) in [(0, "", "of every device"), (1, "METAL_", "for Metal's matrix units alone")] {
        let (names, texts) = (&names[kind], &texts[kind]);
        writeln!(code, "/// Every kernel {which}.\npub static {prefix}ALL: &[&Kernel] = &[{names}];")?;
        writeln!(
            code,
            "/// The files of [`{prefix}ALL`]: name, text.\npub static {prefix}TEXTS: &[(&str, &str)] = &[\n{texts}];"
        )?;
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("kernels.rs"), code)?;
    Ok(())
}

/// One kernel as its text declares it.
struct Signature<'a> {
    name: &'a str,
    doc: Vec<&'a str>,
    buffers: Vec<Argument<'a>>,
    params: &'a str,
    /// Type, name.
    fields: Vec<(&'a str, &'a str)>,
}

/// A buffer among a kernel's arguments: `ACCESS(kind, name, place)`, or `ACCESS_ROWS(kind, name, place)` where it may have a pitch.
struct Argument<'a> {
    access: &'static str,
    rows: bool,
    kind: &'a str,
    name: &'a str,
}

/// What the word before an argument's parentheses says: the access, and whether the buffer may have a pitch.
fn access_of(word: &str) -> Option<(&'static str, bool)> {
    let (word, rows) = word.strip_suffix("_ROWS").map_or((word, false), |word| (word, true));
    match word {
        "READ" => Some(("Read", rows)),
        "WRITE" => Some(("Write", rows)),
        "UPDATE" => Some(("Update", rows)),
        _ => None,
    }
}

fn kernels_of(text: &str) -> Result<Vec<Signature<'_>>> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("\nKERNEL(") {
        let head = &text[at + "\nKERNEL(".len()..];
        let (name, rest) = head.split_once(")(").ok_or("KERNEL( without )(")?;
        let (args, _) = rest.split_once("\n{").or(rest.split_once(") {")).ok_or("a kernel without a body")?;
        let mut doc: Vec<&str> =
            text[..at].lines().rev().take_while(|l| l.starts_with("///")).map(|l| l[3..].trim()).collect();
        doc.reverse();
        let (mut buffers, mut params) = (Vec::new(), None);
        for (index, arg) in args.split("),").enumerate() {
            let arg = arg.trim().trim_end_matches(')');
            let (word, inner) = arg.split_once('(').ok_or_else(|| format!("{name}: argument {arg:?}"))?;
            let parts: Vec<&str> = inner.split(',').map(str::trim).collect();
            let numbered = parts.last().and_then(|n| n.parse().ok()) == Some(index);
            match (word, access_of(word), parts.as_slice(), numbered) {
                (_, Some((access, rows)), [kind, name, _], true) => buffers.push(Argument { access, rows, kind, name }),
                ("PARAMS", _, [kind, _], true) => params = Some(*kind),
                _ => return Err(format!("{name}: argument {index} is {arg:?}").into()),
            }
        }
        let params = params.ok_or_else(|| format!("{name}: no PARAMS"))?;
        let fields = fields_of(text, params).ok_or_else(|| format!("{name}: no struct {params} in its file"))?;
        found.push(Signature { name, doc, buffers, params, fields });
    }
    Ok(found)
}

fn fields_of<'a>(text: &'a str, name: &str) -> Option<Vec<(&'a str, &'a str)>> {
    let head = format!("struct {name} {{");
    let body = text[text.find(&head)? + head.len()..].split_once("};")?.0;
    let lines = body.lines().flat_map(|line| line.split("//").next().unwrap_or_default().split(';')).map(str::trim);
    lines.filter(|line| !line.is_empty()).map(|line| line.split_once(' ')).collect()
}

fn rust_type(kind: &str) -> Result<&'static str> {
    match kind {
        "uint" => Ok("u32"),
        "int" => Ok("i32"),
        "float" => Ok("f32"),
        "ulong" => Ok("u64"),
        other => Err(format!("parameters of type {other} are not known").into()),
    }
}

fn element(kind: &str) -> Result<&'static str> {
    match kind {
        "T" => Ok("Element::T"),
        "float" => Ok("Element::F32"),
        "uint" => Ok("Element::U32"),
        "uchar" => Ok("Element::U8"),
        other => Err(format!("buffers of {other} are not known").into()),
    }
}

impl Signature<'_> {
    fn write_params(&self, code: &mut String) -> Result<()> {
        writeln!(
            code,
            "/// What kernels are told beside their buffers.\n#[allow(missing_docs)]\n#[repr(C)]\n#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]\npub struct {} {{",
            self.params
        )?;
        for (kind, field) in &self.fields {
            writeln!(code, "    pub {field}: {},", rust_type(kind)?)?;
        }
        writeln!(code, "}}")?;
        Ok(())
    }

    fn write(&self, file: &str, code: &mut String) -> Result<()> {
        let Self { name, params, .. } = self;
        let upper = name.to_uppercase();
        writeln!(
            code,
            "/// [`{name}`](fn@{name}) as its text declares it.\npub static {upper}: Kernel = Kernel {{\n    name: {name:?},\n    file: {file:?},\n    buffers: &["
        )?;
        for Argument { access, rows, kind, name } in &self.buffers {
            writeln!(
                code,
                "        Buffer {{ name: {name:?}, access: Access::{access}, element: {}, rows: {rows} }},",
                element(kind)?
            )?;
        }
        writeln!(code, "    ],\n    params_size: size_of::<{params}>(),\n}};")?;
        for line in &self.doc {
            writeln!(code, "/// {line}")?;
        }
        let args: String = self.buffers.iter().map(|buffer| format!("{}: &Tensor, ", buffer.name)).collect();
        let list: String = self.buffers.iter().map(|buffer| format!("{}, ", buffer.name)).collect();
        writeln!(
            code,
            "#[allow(clippy::too_many_arguments)]\npub fn {name}(gpu: &dyn Gpu, dtype: DType, grid: Grid, {args}params: {params}) -> Result<()> {{"
        )?;
        writeln!(
            code,
            "    Call {{ kernel: &{upper}, dtype, grid, buffers: &[{list}], params: bytemuck::bytes_of(&params) }}.launch(gpu)\n}}"
        )?;
        Ok(())
    }
}
