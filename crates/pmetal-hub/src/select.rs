//! Which files of a repository are wanted.

use glob::Pattern;

use crate::{Error, Kind, Result};

/// Names beside weights that a model or tokenizer is read from.
const MODEL_FILES: [&str; 12] = [
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
];
const TEMPLATES: &str = "additional_chat_templates/";
/// The weights of an adapter: PEFT's, mlx-lm's, and the single file.
const ADAPTER_WEIGHTS: [&str; 3] = ["adapter_model.safetensors", "adapters.safetensors", "lora_weights.safetensors"];
/// Weights in formats that are not read.
const OTHER_WEIGHTS: [&str; 8] = ["bin", "pt", "pth", "ckpt", "onnx", "h5", "msgpack", "npz"];
const ROWS: [&str; 5] = ["parquet", "jsonl", "json", "csv", "tsv"];
/// JSON files of a dataset repository that hold no rows.
const NOT_ROWS: [&str; 3] = ["dataset_infos.json", "dataset_info.json", "state.json"];
/// How many names an error lists.
const NAMES_SHOWN: usize = 12;

/// What of a repository is wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Choice {
    /// What a run needs: configuration, tokenizer and safetensors (or the one GGUF file) of a model, the data files of a dataset.
    #[default]
    Needed,
    /// One file, by its path or, for GGUF files, by a part of its name.
    File(String),
    /// Files by pattern; `*` and `?` match slashes too. Without `include` it is what a run needs, less what `exclude` matches.
    Matching {
        /// Patterns of which a file has to match one.
        include: Vec<String>,
        /// Patterns of which a file must match none.
        exclude: Vec<String>,
    },
}

impl Choice {
    /// The chosen among `files` (paths in the repository), in their order.
    ///
    /// # Errors
    /// Where nothing is left, and where a model is ambiguous.
    pub(crate) fn among<'a>(&self, kind: Kind, id: &str, files: &'a [String]) -> Result<Vec<&'a str>> {
        let names: Vec<&str> = files.iter().map(String::as_str).filter(|file| is_plain(file)).collect();
        match self {
            Self::Needed => match kind {
                Kind::Model => needed_of_model(id, &names),
                Kind::Dataset => needed_of_dataset(id, &names),
            },
            Self::File(file) => Ok(vec![one_file(kind, id, file, &names)?]),
            Self::Matching { include, exclude } => {
                let (include, exclude) = (patterns(include)?, patterns(exclude)?);
                let base = if include.is_empty() { Self::Needed.among(kind, id, files)? } else { names.clone() };
                let any = |patterns: &[Pattern], name: &str| patterns.iter().any(|p| p.matches(name));
                let chosen: Vec<&str> = base
                    .into_iter()
                    .filter(|name| (include.is_empty() || any(&include, name)) && !any(&exclude, name))
                    .collect();
                if chosen.is_empty() {
                    return Err(Error::NothingChosen { id: id.to_owned(), found: listed(&names) });
                }
                Ok(chosen)
            }
        }
    }
}

/// Whether a path stays inside its folder.
pub(crate) fn is_plain(path: &str) -> bool {
    !path.is_empty() && !path.contains(['\\', '\0']) && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn patterns(texts: &[String]) -> Result<Vec<Pattern>> {
    let read = |text: &String| {
        // a folder stands for what is in it
        let whole = if text.ends_with('/') { format!("{text}*") } else { text.clone() };
        Pattern::new(&whole).map_err(|e| Error::BadPattern { pattern: text.clone(), reason: e.msg.to_owned() })
    };
    texts.iter().map(read).collect()
}

fn needed_of_model<'a>(id: &str, names: &[&'a str]) -> Result<Vec<&'a str>> {
    let weights = weights_of_model(names);
    let gguf = ggufs(names);
    if weights.is_empty() && !gguf.is_empty() {
        let [file] = gguf.as_slice() else {
            return Err(Error::SeveralGguf { id: id.to_owned(), files: listed(&gguf) });
        };
        return Ok(vec![whole_gguf(id, file)?]);
    }
    if weights.is_empty() {
        let others: Vec<&str> = names.iter().copied().filter(|name| OTHER_WEIGHTS.contains(&ending(name))).collect();
        let config = names.contains(&"config.json");
        if !others.is_empty() || !config {
            let found = if others.is_empty() { listed(names) } else { listed(&others) };
            return Err(Error::NoWeights { id: id.to_owned(), found });
        }
    }
    Ok(names.iter().copied().filter(|name| weights.contains(name) || describes_a_model(name)).collect())
}

fn describes_a_model(name: &str) -> bool {
    let config = name.starts_with("config") && ending(name) == "json";
    let in_root = MODEL_FILES.contains(&name) || config || ending(name) == "model" || ending(name) == "tiktoken";
    (in_root && !name.contains('/')) || (name.starts_with(TEMPLATES) && ending(name) == "jinja")
}

/// The safetensors of the repository's root, each weight once.
fn weights_of_model<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let all = names.iter().copied().filter(|name| ending(name) == "safetensors" && !name.contains('/'));
    let all: Vec<&str> = all.collect();
    let of_the_model = |name: &&str| name.starts_with("model");
    if all.iter().any(of_the_model) {
        // the same weights again under the names of another program
        return all.into_iter().filter(|name| !name.starts_with("consolidated")).collect();
    }
    if names.contains(&"adapter_config.json") {
        // checkpoints of the run lie beside the adapter
        if let Some(adapter) = ADAPTER_WEIGHTS.iter().find_map(|known| all.iter().find(|name| *name == known)) {
            return vec![adapter];
        }
    }
    all
}

/// GGUF files that may be a language model; projectors of images and importance matrices are not.
fn ggufs<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let is_model = |name: &&&str| {
        let file = file_name(name).to_ascii_lowercase();
        ending(name) == "gguf" && !file.starts_with("mmproj") && !file.starts_with("imatrix")
    };
    names.iter().filter(is_model).copied().collect()
}

fn whole_gguf<'a>(id: &str, file: &'a str) -> Result<&'a str> {
    let stem = file_name(file).trim_end_matches(".gguf");
    // NAME-00001-of-00003.gguf
    let mut parts = stem.rsplit('-');
    let number = |part: Option<&str>| part.is_some_and(|p| p.len() == 5 && p.bytes().all(|b| b.is_ascii_digit()));
    if number(parts.next()) && parts.next() == Some("of") && number(parts.next()) {
        return Err(Error::SplitGguf { id: id.to_owned(), file: file.to_owned() });
    }
    Ok(file)
}

fn needed_of_dataset<'a>(id: &str, names: &[&'a str]) -> Result<Vec<&'a str>> {
    let chosen: Vec<&str> = names.iter().copied().filter(|name| holds_rows(name)).collect();
    if chosen.is_empty() { Err(Error::NoData { id: id.to_owned(), found: listed(names) }) } else { Ok(chosen) }
}

fn holds_rows(name: &str) -> bool {
    let hidden = name.split('/').any(|part| part.starts_with('.'));
    let plain = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    ROWS.contains(&ending(plain)) && !hidden && !NOT_ROWS.contains(&file_name(plain))
}

/// The file that `org/name:file` means.
fn one_file<'a>(kind: Kind, id: &str, file: &str, names: &[&'a str]) -> Result<&'a str> {
    let candidates: Vec<&str> = match kind {
        Kind::Model => names.iter().copied().filter(|name| matches!(ending(name), "gguf" | "safetensors")).collect(),
        Kind::Dataset => names.iter().copied().filter(|name| holds_rows(name)).collect(),
    };
    let none = || Error::NoSuchFile { id: id.to_owned(), file: file.to_owned(), files: listed(&candidates) };
    if let Some(exact) = candidates.iter().find(|name| name.eq_ignore_ascii_case(file)) {
        return whole_gguf(id, exact);
    }
    let wanted = file.to_ascii_lowercase();
    let has_part = |name: &&str| file_name(name).to_ascii_lowercase().contains(&wanted);
    let mut matching: Vec<&str> = ggufs(&candidates).into_iter().filter(has_part).collect();
    if matching.len() > 1 {
        // Q4_K names NAME-Q4_K.gguf and not NAME-Q4_K_M.gguf
        let exact: Vec<&str> = matching.iter().copied().filter(|name| is_bounded(name, &wanted)).collect();
        if !exact.is_empty() {
            matching = exact;
        }
    }
    match matching.as_slice() {
        [] => Err(none()),
        [one] => whole_gguf(id, one),
        several => Err(Error::SeveralGguf { id: id.to_owned(), files: listed(several) }),
    }
}

/// Whether a part of a file's name stands between separators.
fn is_bounded(name: &str, part: &str) -> bool {
    let name = file_name(name).to_ascii_lowercase();
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.match_indices(part).any(|(at, found)| {
        let before = name.get(..at).and_then(|text| text.chars().next_back());
        let after = name.get(at + found.len()..).and_then(|text| text.chars().next());
        !before.is_some_and(inside) && !after.is_some_and(inside)
    })
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn ending(name: &str) -> &str {
    file_name(name).rsplit_once('.').map_or("", |(_, ending)| ending)
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() {
        return "no such file".into();
    }
    let mut text = names.iter().take(NAMES_SHOWN).copied().collect::<Vec<_>>().join(", ");
    if names.len() > NAMES_SHOWN {
        text += &format!(" and {} more", names.len() - NAMES_SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(choice: &Choice, kind: Kind, files: &[&str]) -> Result<Vec<String>> {
        let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
        Ok(choice.among(kind, "o/n", &files)?.into_iter().map(str::to_owned).collect())
    }

    fn needed(files: &[&str]) -> Vec<String> {
        choose(&Choice::Needed, Kind::Model, files).unwrap()
    }

    fn refusal(choice: &Choice, kind: Kind, files: &[&str]) -> String {
        choose(choice, kind, files).unwrap_err().to_string()
    }

    #[test]
    fn a_model_is_its_configuration_tokenizer_and_safetensors() {
        let wanted = [
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "vocab.json",
        ];
        let others = [
            ".gitattributes",
            "README.md",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "training_args.bin",
            "onnx/model.onnx",
            "checkpoint-5/model.safetensors",
            "original/config.json",
            "flax_model.msgpack",
            "tf_model.h5",
            "model-q8.gguf",
            "optimizer.pt",
        ];
        assert_eq!(needed(&[&wanted[..], &others[..]].concat()), wanted);
    }

    #[test]
    fn an_adapter_is_its_config_and_its_last_weights() {
        let files =
            ["adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "adapter_model.bin"];
        assert_eq!(needed(&files), ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]);
        let files = ["0000100_adapters.safetensors", "adapter_config.json", "adapters.safetensors"];
        assert_eq!(needed(&files), ["adapter_config.json", "adapters.safetensors"]);
    }

    #[test]
    fn of_gguf_files_one_is_taken_and_several_are_listed() {
        assert_eq!(needed(&["README.md", "m.gguf", "mmproj-m-f16.gguf"]), ["m.gguf"]);
        let files =
            ["m-Q4_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "f32/m-f32-00001-of-00002.gguf", "mmproj-Q8_0.gguf"];
        let message = refusal(&Choice::Needed, Kind::Model, &files);
        assert!(message.contains("m-Q4_K.gguf, m-Q4_K_M.gguf") && message.contains("o/n:FILE.gguf"), "{message}");
        let pick = |file: &str| choose(&Choice::File(file.into()), Kind::Model, &files);
        for (file, expected) in [
            ("m-Q8_0.gguf", "m-Q8_0.gguf"),
            ("q4_k_m", "m-Q4_K_M.gguf"),
            ("Q4_K", "m-Q4_K.gguf"),
            ("q8", "m-Q8_0.gguf"),
        ] {
            assert_eq!(pick(file).unwrap(), [expected], "{file}");
        }
        assert!(pick("Q4").unwrap_err().to_string().contains("several"));
        assert!(pick("Q5_0").unwrap_err().to_string().contains("it has m-Q4_K.gguf"));
        assert!(pick("f32").unwrap_err().to_string().contains("--merge"));
    }

    #[test]
    fn pickles_are_never_taken() {
        let message = refusal(&Choice::Needed, Kind::Model, &["config.json", "pytorch_model.bin"]);
        assert!(message.contains("it has pytorch_model.bin"), "{message}");
        assert!(choose(&Choice::File("pytorch_model.bin".into()), Kind::Model, &["pytorch_model.bin"]).is_err());
        // a configuration alone is a model to start from scratch
        assert_eq!(needed(&["config.json", "tokenizer.json"]), ["config.json", "tokenizer.json"]);
    }

    #[test]
    fn a_dataset_is_its_rows() {
        let rows = ["data/train-0.parquet", "data/test.jsonl.gz", "x.csv", "y.tsv.zst", "z.json"];
        let others = [".gitattributes", "README.md", "dataset_infos.json", "load.py", ".cache/a.json", "a.txt"];
        assert_eq!(choose(&Choice::Needed, Kind::Dataset, &[&rows[..], &others[..]].concat()).unwrap(), rows);
        assert!(refusal(&Choice::Needed, Kind::Dataset, &others).contains("it has .gitattributes"));
        let one = Choice::File("data/test.jsonl.gz".into());
        assert_eq!(choose(&one, Kind::Dataset, &rows).unwrap(), ["data/test.jsonl.gz"]);
    }

    #[test]
    fn patterns_choose_as_in_pythons_client() {
        let files = ["config.json", "model.safetensors", "onnx/model.onnx", "README.md"];
        let choice = |include: &[&str], exclude: &[&str]| Choice::Matching {
            include: include.iter().map(|s| s.to_string()).collect(),
            exclude: exclude.iter().map(|s| s.to_string()).collect(),
        };
        let chosen =
            |include: &[&str], exclude: &[&str]| choose(&choice(include, exclude), Kind::Model, &files).unwrap();
        assert_eq!(chosen(&["*.onnx", "*.md"], &[]), ["onnx/model.onnx", "README.md"]);
        assert_eq!(chosen(&["onnx/"], &[]), ["onnx/model.onnx"]);
        assert_eq!(chosen(&[], &["*.safetensors"]), ["config.json"]);
        assert_eq!(chosen(&["*"], &["*.onnx", "*.md"]), ["config.json", "model.safetensors"]);
        assert!(refusal(&choice(&["*.gguf"], &[]), Kind::Model, &files).contains("--include"));
        assert!(refusal(&choice(&["[a"], &[]), Kind::Model, &files).contains("'[a'"));
    }

    #[test]
    fn paths_that_leave_their_folder_are_not_taken() {
        for path in ["../a.json", "/a.json", "a/../../b.json", "a//b.json", "a\\b.json", "", "./a.json"] {
            assert!(!is_plain(path), "{path}");
        }
        assert_eq!(
            needed(&["../config.json", "config.json", "model.safetensors"]),
            ["config.json", "model.safetensors"]
        );
    }
}
