//! Reading a dataset takes memory for what is read at a time, not for the file.

use std::{fs, path::Path};

use pmetal::{
    data::{CacheChoice, Dataset, DatasetOptions, Source, Stats, Template, TemplateChoice, Tokenizer},
    memory::{self, PoolAllocator},
};

#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

/// A row with something of its own, so that nothing is the same twice.
fn row(n: usize) -> String {
    let answer = format!("{{\"name\": \"Mara\", \"count\": {n}, \"colour\": \"blue\"}} ").repeat(4);
    serde_json::json!({"instruction": format!("Order number {n}"), "output": answer}).to_string()
}

/// The most memory that reading and counting `rows` rows takes beyond what was there before.
fn peak_of(rows: usize, tokenizer: &Tokenizer) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    fs::write(&file, (0..rows).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let template = Template::choose(&TemplateChoice::Auto, tokenizer).unwrap();
    let options = DatasetOptions { cache: CacheChoice::Temporary, ..DatasetOptions::new(template, usize::MAX) };
    memory::reset_peak();
    let before = memory::live_bytes();
    let dataset = Dataset::load(&Source::find(&file).unwrap().into(), tokenizer, &options, &mut ()).unwrap();
    assert_eq!(Stats::of(&dataset.examples, 0).unwrap().rows, rows);
    memory::peak_bytes() - before
}

#[test]
fn four_times_the_rows_take_the_same_memory() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/quickstart/base");
    let tokenizer = Tokenizer::from_model_path(base).unwrap();
    peak_of(3000, &tokenizer);
    let small = peak_of(6000, &tokenizer);
    let large = peak_of(24_000, &tokenizer);
    // lengths and the hashes that duplicates are found by: some tens of bytes a row
    assert!(large < small + 100 * 18_000, "{large} bytes for 24,000 rows, {small} for 6,000");
}
