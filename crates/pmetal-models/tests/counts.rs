//! Parameters of public models, from their config.json alone, against counts made elsewhere (configs/README.md).

use std::{collections::BTreeMap, fs, path::Path};

use pmetal_models::{parameters_of, spec_of};
use serde_json::Value;

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn parameters_of_public_models_are_counted_exactly() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configs");
    let expected: BTreeMap<String, u64> = serde_json::from_value(read(&folder.join("counts.json"))).unwrap();
    let mut wrong = Vec::new();
    for (name, expected) in &expected {
        let spec = spec_of(&read(&folder.join(format!("{name}.json")))).unwrap();
        let found: u64 = parameters_of(&spec).unwrap().iter().map(|(_, shape)| shape.elem_count() as u64).sum();
        if found != *expected {
            wrong.push(format!("{name}: {found} instead of {expected}"));
        }
    }
    assert!(expected.len() > 50 && wrong.is_empty(), "{}", wrong.join("\n"));
}
