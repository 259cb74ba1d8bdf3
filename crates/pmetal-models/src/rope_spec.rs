//! How fast each pair of a head turns.
//!
//! Plain rope turns pair `i` of `d / 2` by `theta^(-2i/d)` per position. Scaled kinds change these frequencies once, so all that the decoder
//! sees is the list. Sources: Su et al., "RoFormer", 2021; Chen et al., "Position Interpolation", 2023 (linear); Meta's Llama 3.1 release
//! (llama3).

use std::f64::consts::PI;

use crate::{Result, keys::Keys};

/// The kinds of scaling there are, as `rope_type` names them.
pub const ROPE_SCALING_KINDS: [&str; 3] = ["default", "linear", "llama3"];

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// The base of the frequencies.
    pub theta: f64,
    /// Radians per position of each pair, `head_dim / 2` of them.
    pub inv_freq: Vec<f32>,
}

impl RopeSpec {
    /// Reads the keys of today (`rope_parameters`) and of earlier files (`rope_theta` and `rope_scaling`, whose kind is `type` or
    /// `rope_type`). As in transformers, a filled `rope_scaling` replaces `rope_parameters`, and a theta inside beats the one outside.
    pub(crate) fn read(config: &Keys, head_dim: usize, max_positions: usize) -> Result<Self> {
        let scaling = match config.object("rope_scaling")? {
            Some(scaling) => Some(scaling),
            None => config.object("rope_parameters")?,
        };
        let inner_theta = scaling.map(|s| s.positive("rope_theta")).transpose()?.flatten();
        let theta = inner_theta.or(config.positive("rope_theta")?).unwrap_or(10_000.0);
        let plain: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let scaled = match scaling {
            Some(scaling) => scaled(&scaling, config, plain, max_positions)?,
            None => plain,
        };
        Ok(Self { theta, inv_freq: scaled.into_iter().map(|f| f as f32).collect() })
    }
}

fn scaled(scaling: &Keys, config: &Keys, plain: Vec<f64>, max_positions: usize) -> Result<Vec<f64>> {
    let kind = scaling.text("rope_type")?.or(scaling.text("type")?).unwrap_or("default");
    if kind == "default" {
        return Ok(plain);
    }
    for keys in [scaling, config] {
        if let Some(share) = keys.number("partial_rotary_factor")?.filter(|&share| share != 1.0) {
            return Err(keys.refuse("partial_rotary_factor", format!("{share} is not supported, only 1")));
        }
    }
    match kind {
        "linear" => {
            let factor = scaling.required_positive("factor")?;
            Ok(plain.into_iter().map(|f| f / factor).collect())
        }
        "llama3" => {
            let original = match config.size("original_max_position_embeddings")? {
                Some(outer) => Some(outer),
                None => scaling.size("original_max_position_embeddings")?,
            };
            let bands = Llama3::read(scaling, original.unwrap_or(max_positions))?;
            Ok(plain.into_iter().map(|f| bands.scale(f)).collect())
        }
        // what a GGUF file states in place of the numbers of llama3
        "pmetal_factors" => {
            let factors = scaling.required_positives("factors")?;
            if factors.len() != plain.len() {
                return Err(scaling.refuse("factors", format!("expected {}, found {}", plain.len(), factors.len())));
            }
            Ok(plain.into_iter().zip(factors).map(|(f, factor)| f / factor).collect())
        }
        other => Err(scaling.refuse(
            "rope_type",
            format!("{other} is not supported, only {}; choose another model", ROPE_SCALING_KINDS.join(", ")),
        )),
    }
}

/// Long wavelengths are divided by `factor`, short ones stay, those between are blended.
pub(crate) struct Llama3 {
    pub(crate) factor: f64,
    pub(crate) low_freq_factor: f64,
    pub(crate) high_freq_factor: f64,
    pub(crate) original: f64,
}

impl Llama3 {
    fn read(keys: &Keys, original: usize) -> Result<Self> {
        Ok(Self {
            factor: keys.required_positive("factor")?,
            low_freq_factor: keys.required_positive("low_freq_factor")?,
            high_freq_factor: keys.required_positive("high_freq_factor")?,
            original: original as f64,
        })
    }

    pub(crate) fn scale(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * PI / frequency;
        if wavelength < self.original / self.high_freq_factor {
            return frequency;
        }
        if wavelength > self.original / self.low_freq_factor {
            return frequency / self.factor;
        }
        let band = self.high_freq_factor - self.low_freq_factor;
        // equal factors leave no band: the two tests above miss only its single point
        let smooth = if band == 0.0 { 1.0 } else { (self.original / wavelength - self.low_freq_factor) / band };
        frequency * ((1.0 - smooth) / self.factor + smooth)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn frequencies(config: &Value) -> Result<Vec<f32>> {
        Ok(RopeSpec::read(&Keys::new(config), 8, 4096)?.inv_freq)
    }

    fn close(config: Value, want: [f32; 4]) {
        let got = frequencies(&config).unwrap();
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-6 * w), "{config}: {got:?}, wanted {want:?}");
    }

    const PLAIN: [f32; 4] = [1.0, 0.1, 0.01, 0.001];

    #[test]
    fn old_and_new_keys_say_the_same() {
        close(json!({}), PLAIN);
        close(json!({"rope_theta": 10000.0, "rope_scaling": null}), PLAIN);
        close(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}), PLAIN);
        let halves = PLAIN.map(|f| f / 2.0);
        close(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), halves);
        close(json!({"rope_parameters": {"rope_type": "linear", "factor": 2}}), halves);
        let millions = [1.0, 1e6f32.powf(-0.25), 1e-3, 1e6f32.powf(-0.75)];
        close(json!({"rope_theta": 1e6}), millions);
        // the theta inside wins, and rope_scaling stands in for rope_parameters
        close(json!({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e6}}), millions);
        close(json!({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn"}}), PLAIN);
        close(
            json!({"rope_scaling": {"rope_type": "pmetal_factors", "factors": [1, 1, 2, 4]}}),
            [1.0, 0.1, 0.005, 0.00025],
        );
    }

    // transformers 5.23, ROPE_INIT_FUNCTIONS["llama3"] with head_dim 8, theta 10000
    #[test]
    fn llama3_bands() {
        let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}});
        close(llama3, LLAMA3_FROM_TRANSFORMERS);
    }

    const LLAMA3_FROM_TRANSFORMERS: [f32; 4] = [1.0, 0.1, 0.003_086_760_6, 0.000_125];

    #[test]
    fn what_is_not_supported_is_named() {
        for kind in ["yarn", "dynamic", "longrope"] {
            let error =
                frequencies(&json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}})).unwrap_err().to_string();
            assert!(error.contains("rope_scaling.rope_type") && error.contains(kind), "{error}");
        }
        let partial = json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5});
        assert!(frequencies(&partial).unwrap_err().to_string().contains("partial_rotary_factor"));
        assert!(
            frequencies(&json!({"rope_scaling": {"type": "linear"}}))
                .unwrap_err()
                .to_string()
                .contains("factor: is missing")
        );
        assert!(frequencies(&json!({"rope_theta": 0})).is_err());
        assert!(frequencies(&json!({"rope_scaling": {"rope_type": "pmetal_factors", "factors": [1]}})).is_err());
    }
}
