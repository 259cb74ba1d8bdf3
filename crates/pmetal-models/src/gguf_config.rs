//! What a GGUF file's configuration becomes where other tools must understand it.

use serde_json::{Value, json};

use crate::rope_spec::Llama3;

/// The numbers of every released Llama 3.1, 3.2 and 3.3, their factor aside; [`HIGH_FREQ_FACTORS`] has their other one.
const LOW_FREQ_FACTOR: f32 = 1.0;
const ORIGINAL_CONTEXT: f32 = 8192.0;
/// Llama 3's, and that of Llama 4, which leaves no band between fast and slow pairs.
const HIGH_FREQ_FACTORS: [f32; 2] = [4.0, 1.0];

/// A GGUF file states the divisors of rope's frequencies, not the four numbers of `llama3` scaling they came from. Where they are those of
/// the released models, the configuration says so; otherwise it stays as it is.
pub(crate) fn standard(mut config: Value) -> Value {
    if let Some((factor, high_freq_factor)) = llama3_factors(&config) {
        config["rope_scaling"] = json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": ORIGINAL_CONTEXT as u64,
        });
    }
    config
}

fn llama3_factors(config: &Value) -> Option<(f64, f32)> {
    let factors: Vec<f64> =
        config["rope_scaling"]["factors"].as_array()?.iter().map(Value::as_f64).collect::<Option<_>>()?;
    let theta = config["rope_theta"].as_f64()?;
    // the slowest pairs are divided by all of it
    let factor = factors.iter().copied().fold(1.0, f64::max);
    let n = factors.len() as f64;
    let fits = |high_freq_factor: &f32| {
        let bands = Llama3 {
            factor: factor as f32,
            low_freq_factor: LOW_FREQ_FACTOR,
            high_freq_factor: *high_freq_factor,
            original: ORIGINAL_CONTEXT,
        };
        factors.iter().enumerate().all(|(i, &stated)| {
            let frequency = theta.powf(-(i as f64) / n) as f32;
            (f64::from(frequency / bands.scale(frequency)) - stated).abs() <= 1e-4 * stated
        })
    };
    Some((factor, HIGH_FREQ_FACTORS.into_iter().find(fits)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divisors_of_llama_3_2_are_recognised() {
        let bands = Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192.0 };
        let frequencies: Vec<f32> = (0..32).map(|i| 500_000f64.powf(-f64::from(i) / 32.0) as f32).collect();
        let factors: Vec<f32> = frequencies.iter().map(|&f| f / bands.scale(f)).collect();
        let config =
            json!({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "pmetal_factors", "factors": factors}});
        let standard = super::standard(config.clone());
        assert_eq!(standard["rope_scaling"]["rope_type"], "llama3");
        assert_eq!(standard["rope_scaling"]["factor"], 32.0);

        let mut other = config;
        other["rope_scaling"]["factors"][20] = json!(17.0);
        assert_eq!(super::standard(other.clone()), other);
    }

    #[test]
    fn the_divisors_of_llama_4_scout_are_recognised() {
        let factors: Vec<f64> = (0..64)
            .map(|i| std::f64::consts::TAU * 500_000f64.powf(f64::from(i) / 64.0))
            .map(|wavelength| if wavelength > 8192.0 { 16.0 } else { 1.0 })
            .collect();
        let config =
            json!({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "pmetal_factors", "factors": factors}});
        let scaling = &standard(config)["rope_scaling"];
        assert_eq!((&scaling["factor"], &scaling["high_freq_factor"]), (&json!(16.0), &json!(1.0)));
    }
}
