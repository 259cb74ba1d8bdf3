use serde_json::{Value, json};

use super::*;

const HEAD_DIM: usize = 8;

fn read(config: &Value, defaults: RopeDefaults) -> Result<RopeSpec> {
    RopeSpec::read(&Keys::new(config), defaults, HEAD_DIM, 4096)
}

fn frequencies(config: &Value) -> Result<Vec<f32>> {
    Ok(read(config, RopeDefaults::default())?.inv_freq(1).into_owned())
}

fn refusal(config: &Value) -> String {
    frequencies(config).unwrap_err().to_string()
}

fn close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}");
    let far = got.iter().zip(want).find(|(g, w)| (**g - **w).abs() > tolerance * w.abs());
    assert!(far.is_none(), "{name}: {far:?} in {got:?}, wanted {want:?}");
}

/// What the families of `scripts/parity/rope.py` mean by silence.
fn defaults(family: &Value) -> RopeDefaults {
    let of_parts = family == "phi3";
    RopeDefaults { partial: of_parts, yarn_is_longrope: of_parts, ..RopeDefaults::default() }
}

// a few units in the last place: the powers of f32 are another library's
const FIXED: f32 = 3e-7;
// transformers computes the grown base in f32
const GROWN: f32 = 2e-6;

#[test]
fn every_kind_is_as_transformers_computes_it() {
    let file: Value = serde_json::from_str(include_str!("../../tests/rope.json")).unwrap();
    let size = |key: &str| file[key].as_u64().unwrap() as usize;
    for case in file["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (config, context) = (Keys::new(&case["config"]), size("max_position_embeddings"));
        let spec = RopeSpec::read(&config, defaults(&case["family"]), size("head_dim"), context).unwrap();
        for row in case["rows"].as_array().unwrap() {
            let length = row["length"].as_u64().unwrap() as usize;
            let want: Vec<f32> =
                row["inv_freq"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            let tolerance = if name == "dynamic" && length > context { GROWN } else { FIXED };
            close(&format!("{name}, {length}"), &spec.inv_freq(length), &want, tolerance);
            assert_eq!(spec.rotary_dim, 2 * want.len(), "{name}");
        }
        let factor = case["attention_factor"].as_f64().unwrap() as f32;
        close(name, &[spec.attention_factor], &[factor], f32::EPSILON);
        if let Some(factor) = case["softmax_factor"].as_f64() {
            assert!((spec.softmax_factor - factor).abs() < 1e-12, "{name}: {}, wanted {factor}", spec.softmax_factor);
        }
        assert_eq!(spec.depends_on_length(), case["rows"].as_array().unwrap().len() > 1, "{name}");
    }
}

#[test]
fn old_and_new_keys_say_the_same() {
    const PLAIN: [f32; 4] = [1.0, 0.1, 0.01, 0.001];
    let same = |config: Value, want: &[f32]| close(&config.to_string(), &frequencies(&config).unwrap(), want, 1e-6);
    same(json!({}), &PLAIN);
    same(json!({"rope_theta": 10000.0, "rope_scaling": null}), &PLAIN);
    same(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}), &PLAIN);
    let halves = PLAIN.map(|f| f / 2.0);
    same(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), &halves);
    same(json!({"rope_parameters": {"rope_type": "linear", "factor": 2}}), &halves);
    let millions = [1.0, 1e6f32.powf(-0.25), 1e-3, 1e6f32.powf(-0.75)];
    same(json!({"rope_theta": 1e6}), &millions);
    // the theta inside wins, and rope_scaling stands in for rope_parameters
    same(json!({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e6}}), &millions);
    same(json!({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn", "factor": 2}}), &PLAIN);
    same(
        json!({"rope_scaling": {"rope_type": "pmetal_factors", "factors": [1, 1, 2, 4]}}),
        &[1.0, 0.1, 0.005, 0.00025],
    );
}

#[test]
fn a_layers_own_settings_do_not_take_the_models_base() {
    let config = json!({"rope_theta": 5.0, "local": {"rope_type": "linear", "factor": 2.0}});
    let keys = Keys::new(&config);
    let defaults = RopeDefaults { theta: 1e6, ..RopeDefaults::default() };
    let local = keys.object("local").unwrap();
    let read = |scaling: Option<&Keys>| RopeSpec::read_from(scaling, &keys, defaults, HEAD_DIM, 64).unwrap();
    assert_eq!(read(local.as_ref()).theta, 1e6);
    close(
        "halved",
        &read(local.as_ref()).inv_freq(1),
        &read(None).inv_freq(1).iter().map(|f| f / 2.0).collect::<Vec<_>>(),
        1e-7,
    );
}

#[test]
fn rows_that_grow_beyond_the_context_reach_further() {
    let spec = read(&json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), RopeDefaults::default()).unwrap();
    assert_eq!([spec.context(4096), spec.inv_freq(4097).len()], [16384, 4]);
    assert_eq!(read(&json!({}), RopeDefaults::default()).unwrap().context(4096), 4096);
}

#[test]
fn what_is_not_supported_is_named() {
    let mrope = refusal(&json!({"rope_scaling": {"type": "mrope"}}));
    assert!(mrope.contains("rope_scaling.rope_type: mrope") && mrope.contains("default, dynamic"), "{mrope}");
    for (settings, wanted) in [
        (json!({"type": "linear"}), "factor: is missing"),
        (json!({"type": "dynamic", "factor": -1}), "factor: expected a number above 0"),
        (json!({"type": "longrope", "short_factor": [1, 1, 1, 1]}), "long_factor: is missing"),
        (
            json!({"type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1]}),
            "short_factor: expected 4, found 3",
        ),
        (json!({"type": "pmetal_factors", "factors": [1]}), "factors: expected 4, found 1"),
        (json!({"type": "yarn", "factor": 2, "beta_fast": 0}), "beta_fast: expected a number above 0"),
        (json!({"type": "yarn", "factor": 2, "truncate": 1}), "truncate: expected true or false"),
        (json!({"type": "yarn", "factor": 2, "rope_theta": 1}), "rope_type: the numbers of yarn come to no finite"),
        (
            json!({"type": "linear", "factor": 2, "partial_rotary_factor": 0.1}),
            "partial_rotary_factor: 0.1 of heads of 8",
        ),
        (
            json!({"type": "linear", "factor": 2, "partial_rotary_factor": 1.5}),
            "partial_rotary_factor: 1.5 of heads of 8",
        ),
    ] {
        let said = refusal(&json!({"rope_scaling": settings}));
        assert!(said.contains(wanted), "{said}, wanted {wanted}");
    }
    assert!(frequencies(&json!({"rope_theta": 0})).is_err());
    assert!(frequencies(&json!({"rope_theta": 1e-60})).is_err());
}

fn changed(mut config: Value, text: &str) -> Value {
    override_rope_scaling(&mut config, text).unwrap();
    config
}

#[test]
fn a_scaling_takes_the_place_of_the_stated_one() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100});
    let old =
        json!({"rope_theta": 5.0, "max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2}});
    assert_eq!(
        changed(old.clone(), "yarn:4"),
        json!({"rope_theta": 5.0, "max_position_embeddings": 400, "rope_scaling": yarn})
    );
    assert_eq!(changed(old, "none")["rope_scaling"], json!({"rope_type": "default"}));
    let text = json!({"text_config": {"rope_scaling": null}, "vision": 1});
    let linear = json!({"rope_type": "linear", "factor": 2.5});
    assert_eq!(changed(text, "linear:2.5"), json!({"text_config": {"rope_scaling": linear}, "vision": 1}));
    let today = json!({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0}});
    assert_eq!(
        changed(today, "dynamic:2"),
        json!({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 7.0}})
    );
    let layers =
        json!({"rope_parameters": {"sliding_attention": {"rope_theta": 1}, "full_attention": {"rope_theta": 2}}});
    assert_eq!(
        changed(layers, "{\"type\": \"linear\", \"factor\": 3, \"rope_theta\": 8}")["rope_parameters"],
        json!({"sliding_attention": {"rope_theta": 1}, "full_attention": {"rope_type": "linear", "factor": 3, "rope_theta": 8}})
    );
}

#[test]
fn what_is_no_scaling_is_refused() {
    for (text, wanted) in [
        ("ntk:2", "the kind ntk is not one of default, dynamic, linear, llama3, longrope, yarn"),
        ("{\"type\": \"ntk\"}", "the kind ntk is not one of"),
        ("yarn", "expected yarn:FACTOR"),
        ("yarn:0", "expected yarn:FACTOR"),
        ("linear:x", "expected linear:FACTOR"),
        ("llama3:8", "more settings than a factor"),
        ("{\"factor\": 2}", "has no rope_type"),
        ("{", "is no JSON object"),
    ] {
        let said = override_rope_scaling(&mut json!({}), text).unwrap_err().to_string();
        assert!(said.contains(wanted) && said.contains("--rope-scaling"), "{said}, wanted {wanted}");
    }
}
