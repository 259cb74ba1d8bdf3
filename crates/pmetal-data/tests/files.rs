//! The same rows out of files of every kind; see `scripts/make-data-fixtures.py`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use pmetal_data::{
    CacheChoice, Dataset, DatasetOptions, Example, Mix, Source, Split, Template, TemplateChoice, Tokenizer,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/files").join(name)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_model_path(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/quickstart/base")).unwrap()
}

fn options(tokenizer: &Tokenizer) -> DatasetOptions {
    let template = Template::choose(&TemplateChoice::Auto, tokenizer).unwrap();
    DatasetOptions { cache: CacheChoice::Temporary, ..DatasetOptions::new(template, usize::MAX) }
}

fn examples(mix: &Mix, options: &DatasetOptions, tokenizer: &Tokenizer) -> Vec<Example> {
    let dataset = Dataset::load(mix, tokenizer, options, &mut ()).unwrap();
    dataset.examples.iter().map(Result::unwrap).collect()
}

fn of_file(path: &Path, columns: &str) -> Vec<Example> {
    let tokenizer = tokenizer();
    let options = DatasetOptions { columns: columns.parse().unwrap(), ..options(&tokenizer) };
    examples(&Source::find(path).unwrap().into(), &options, &tokenizer)
}

#[test]
fn parquet_in_every_codec_and_csv_read_as_the_json_lines_do() {
    let rows = of_file(&fixture("rows.jsonl"), "");
    assert_eq!(rows.len(), 40);
    for codec in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"] {
        assert_eq!(of_file(&fixture(&format!("{codec}.parquet")), ""), rows, "{codec}");
    }
    assert_eq!(of_file(&fixture("qa.csv"), "instruction=question,output=answer"), rows);
    assert_eq!(of_file(&fixture("snappy.parquet"), "messages=messages"), rows);
}

#[test]
fn numbers_and_dotted_columns_become_text() {
    let rows = of_file(&fixture("gzip.parquet"), "instruction=messages.0.content,output=n");
    let plain = of_file(&fixture("rows.jsonl"), "instruction=messages.0.content,output=n");
    assert_eq!(rows, plain);
    let tokenizer = tokenizer();
    let answer: Vec<u32> = rows[7].labels.iter().filter(|&&label| label >= 0).map(|&label| label as u32).collect();
    assert_eq!(tokenizer.decode(&answer).unwrap(), "7");
}

#[test]
fn damaged_parquet_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture("snappy.parquet")).unwrap();
    let tokenizer = tokenizer();
    let mut texts = Vec::new();
    for cut in [4, 100, bytes.len() / 2, bytes.len() - 1] {
        let path = folder.path().join("cut.parquet");
        fs::write(&path, &bytes[..cut]).unwrap();
        let error = Dataset::load(&Source::find(&path).unwrap().into(), &tokenizer, &options(&tokenizer), &mut ());
        texts.push(error.unwrap_err().to_string());
    }
    assert!(texts.iter().all(|text| text.contains("cut.parquet is no whole Parquet file")), "{texts:#?}");
}

#[test]
fn what_was_tokenized_is_found_again_until_something_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, file) = (folder.path().join("cache"), folder.path().join("rows.jsonl"));
    fs::copy(fixture("rows.jsonl"), &file).unwrap();
    let tokenizer = tokenizer();
    let load = |train_on: &str, max_seq_len: usize| {
        let cache = CacheChoice::Folder(cache.clone());
        let options = DatasetOptions { cache, train_on: train_on.parse().unwrap(), max_seq_len, ..options(&tokenizer) };
        let rows = examples(&Source::find(&file).unwrap().into(), &options, &tokenizer);
        (rows, fs::read_dir(cache_of(&options)).unwrap().count())
    };
    let (first, stores) = load("assistant", 0);
    assert_eq!(stores, 1);
    // a cut is made when rows are read, not when they are kept
    let (again, stores) = load("assistant", 45);
    assert_eq!(stores, 1);
    assert!(again.iter().zip(&first).all(|(cut, whole)| cut.input_ids == whole.input_ids[..45]));
    assert_eq!(load("all", 0).1, 2);
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen("How much", "What", 1)).unwrap();
    let (changed, stores) = load("assistant", 0);
    assert_eq!(stores, 3);
    assert!(changed[0] != first[0] && changed[1..] == first[1..]);

    // half of what another run left is no reason to fail, or to trust it
    for store in fs::read_dir(&cache).unwrap() {
        fs::write(store.unwrap().path().join("index"), "cut").unwrap();
    }
    assert_eq!(load("assistant", 0), (changed, 3));
}

fn cache_of(options: &DatasetOptions) -> PathBuf {
    match &options.cache {
        CacheChoice::Folder(folder) => folder.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn folders_weights_and_the_first_rows() {
    let folder = tempfile::tempdir().unwrap();
    let lines: Vec<String> = fs::read_to_string(fixture("rows.jsonl")).unwrap().lines().map(str::to_owned).collect();
    fs::create_dir(folder.path().join("data")).unwrap();
    fs::write(folder.path().join("data/train-0.jsonl"), lines[..10].join("\n")).unwrap();
    fs::write(folder.path().join("data/train-1.jsonl"), lines[10..30].join("\n")).unwrap();
    fs::write(folder.path().join("data/validation.jsonl"), lines[30..].join("\n")).unwrap();
    let tokenizer = tokenizer();
    let whole = of_file(&fixture("rows.jsonl"), "");
    let source = Source::find(folder.path()).unwrap();
    let mix = |weight: f64, split| Mix { parts: vec![(source.clone(), weight)], split, seed: 3 };
    assert_eq!(examples(&mix(1.0, Split::Train), &options(&tokenizer), &tokenizer), whole[..30]);
    assert_eq!(examples(&mix(1.0, Split::Valid), &options(&tokenizer), &tokenizer), whole[30..]);
    let twice = examples(&mix(2.0, Split::Train), &options(&tokenizer), &tokenizer);
    assert_eq!((twice.len(), &twice[30..40]), (60, &whole[..10]));
    let half = examples(&mix(0.5, Split::Train), &options(&tokenizer), &tokenizer);
    assert_eq!(half.len(), 15);
    assert!(half.iter().all(|row| whole[..30].contains(row)));
    let few = DatasetOptions { max_samples: Some(4), ..options(&tokenizer) };
    let first = examples(&mix(1.0, Split::Train), &few, &tokenizer);
    assert_eq!(first, [&whole[..4], &whole[10..14]].concat());
}
