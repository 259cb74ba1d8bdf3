//! The kinds of scaling.
//!
//! Sources: Chen et al., "Position Interpolation", 2023 (linear); Peng et al., "YaRN", 2023 (yarn, and dynamic NTK); Ding et al.,
//! "LongRoPE", 2024; DeepSeek-V2's report (the two mscales); Meta's Llama 3.1 release (llama3). Numbers are f32 where transformers' are, as
//! models were trained with them so: a position of many thousands multiplies what differs.

use std::f64::consts::PI;

use crate::{ByLength, Frequencies, ROPE_SCALING_KINDS, Result, RopeSpec, keys::Keys, rope_spec::RopeDefaults};

const ORIGINAL: &str = "original_max_position_embeddings";

/// Settings, and what they refer to.
struct Scaling<'a> {
    keys: Keys<'a>,
    /// What `original_max_position_embeddings` says, within or without.
    original: usize,
    max_positions: usize,
    theta: f64,
    /// Columns that turn, before an odd number of them is rounded up.
    dim: usize,
}

/// See [`RopeSpec::read_from`].
pub(super) fn read(
    keys: Option<Keys>,
    config: &Keys,
    defaults: RopeDefaults,
    head_dim: usize,
    max_positions: usize,
) -> Result<RopeSpec> {
    let stated = match &keys {
        Some(keys) => keys.text("rope_type")?.or(keys.text("type")?),
        None => None,
    };
    let kind = match stated.unwrap_or("default") {
        "su" => "longrope",
        "yarn" if defaults.yarn_is_longrope => "longrope",
        kind => kind,
    };
    let theta = keys.map(|keys| keys.positive("rope_theta")).transpose()?.flatten().unwrap_or(defaults.theta);
    let is_partial = defaults.partial || kind != "default";
    let dim = if is_partial { rotary_dim(keys.as_ref(), config, head_dim)? } else { head_dim };
    let mut spec = RopeSpec {
        theta,
        rotary_dim: dim.next_multiple_of(2),
        attention_factor: 1.0,
        softmax_factor: 1.0,
        frequencies: Frequencies::Fixed(Vec::new()),
    };
    let (frequencies, attention_factor) = match keys.filter(|_| kind != "default") {
        None => (Frequencies::Fixed(plain(theta, dim)), 1.0),
        Some(keys) => {
            let original = config.size(ORIGINAL)?.or(keys.size(ORIGINAL)?).unwrap_or(max_positions);
            let scaling = Scaling { keys, original, max_positions, theta, dim };
            spec.softmax_factor = scaling.softmax_factor()?;
            scaling.of_kind(kind)?
        }
    };
    (spec.frequencies, spec.attention_factor) = (frequencies, attention_factor as f32);
    let lengths = [1, max_positions, LONGEST];
    let finite = lengths.iter().all(|&length| spec.inv_freq(length).iter().all(|f| f.is_finite()));
    if !finite || !spec.attention_factor.is_finite() || !spec.softmax_factor.is_finite() {
        let reason = format!("the numbers of {kind} come to no finite frequencies and factor");
        return Err(keys.as_ref().unwrap_or(config).refuse("rope_type", reason));
    }
    Ok(spec)
}

/// A row longer than any.
const LONGEST: usize = u32::MAX as usize;

/// How many columns of a head turn.
fn rotary_dim(keys: Option<&Keys>, config: &Keys, head_dim: usize) -> Result<usize> {
    const KEY: &str = "partial_rotary_factor";
    let inner = keys.map(|keys| keys.positive(KEY)).transpose()?.flatten();
    let share = inner.or(config.positive(KEY)?).unwrap_or(1.0);
    let dim = (head_dim as f64 * share) as usize;
    if dim == 0 || share > 1.0 {
        return Err(config.refuse(KEY, format!("{share} of heads of {head_dim}: expected a share of at most 1")));
    }
    Ok(dim)
}

/// `theta^(-i / dim)` for each even `i`.
pub(super) fn plain(theta: f64, dim: usize) -> Vec<f32> {
    powers(theta, dim).map(|power| 1.0 / power).collect()
}

fn powers(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    let theta = f64::from(theta as f32);
    (0..dim).step_by(2).map(move |i| theta.powf(f64::from(i as f32 / dim as f32)) as f32)
}

/// The base for a row that is longer than `context`; `theta` for others.
pub(super) fn grown(theta: f64, factor: f64, row_len: usize, context: usize, dim: usize) -> f64 {
    if row_len <= context {
        return theta;
    }
    let (reach, dim) = (factor * row_len as f64 / context as f64 - (factor - 1.0), dim as f64);
    theta * reach.powf(dim / (dim - 2.0))
}

/// Yarn's temperature for a context of `scale` times the original.
fn mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

impl Scaling<'_> {
    /// Frequencies, and the factor on cosines and sines.
    fn of_kind(&self, kind: &str) -> Result<(Frequencies, f64)> {
        let plain = plain(self.theta, self.dim).into_iter();
        let fixed: Vec<f32> = match kind {
            "linear" => {
                let factor = self.keys.required_positive("factor")? as f32;
                plain.map(|f| f / factor).collect()
            }
            "llama3" => {
                let bands = Llama3::read(&self.keys, self.original)?;
                plain.map(|f| bands.scale(f)).collect()
            }
            "yarn" => return Ok((Frequencies::Fixed(self.yarn()?), self.yarn_attention_factor()?)),
            // what a GGUF file states in place of the numbers of llama3
            "pmetal_factors" => plain.zip(self.divisors("factors")?).map(|(f, factor)| f / factor).collect(),
            "dynamic" => {
                let factor = self.keys.required_positive("factor")?;
                let dynamic = ByLength::Dynamic { factor, context: self.max_positions, dim: self.dim };
                return Ok((Frequencies::ByLength(dynamic), 1.0));
            }
            "longrope" => return Ok((Frequencies::ByLength(self.longrope()?), self.longrope_attention_factor()?)),
            other => {
                let known = ROPE_SCALING_KINDS.join(", ");
                let reason = format!("{other} is not supported, only {known}; choose another model");
                return Err(self.keys.refuse("rope_type", reason));
            }
        };
        Ok((Frequencies::Fixed(fixed), 1.0))
    }

    /// A list with one divisor per frequency.
    fn divisors(&self, key: &str) -> Result<Vec<f32>> {
        let (divisors, pairs) = (self.keys.required_positives(key)?, self.dim.div_ceil(2));
        if divisors.len() != pairs {
            return Err(self.keys.refuse(key, format!("expected {pairs}, found {}", divisors.len())));
        }
        Ok(divisors.into_iter().map(|divisor| divisor as f32).collect())
    }

    /// `factor`, or where it is absent the context over the original.
    fn factor(&self) -> Result<f64> {
        Ok(self.keys.positive("factor")?.unwrap_or(self.max_positions as f64 / self.original as f64))
    }

    /// Pairs that turn often within the original context stay, those that turn rarely are divided by the factor, with a ramp between.
    fn yarn(&self) -> Result<Vec<f32>> {
        let factor = self.factor()?;
        let dim = self.dim as f64;
        // the index, real, of the pair that turns so many times
        let index = |turns: f64| dim * (self.original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let low = index(self.keys.positive("beta_fast")?.unwrap_or(32.0));
        let high = index(self.keys.positive("beta_slow")?.unwrap_or(1.0));
        let truncate = self.keys.boolean("truncate")?.unwrap_or(true);
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let ramp = |pair: usize| ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let blend = |(pair, power): (usize, f32)| {
            let kept = 1.0 - ramp(pair);
            1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        };
        Ok(powers(self.theta, self.dim).enumerate().map(blend).collect())
    }

    fn yarn_attention_factor(&self) -> Result<f64> {
        if let Some(stated) = self.keys.number("attention_factor")? {
            return Ok(stated);
        }
        let factor = self.factor()?;
        let stated = |key| Ok::<_, crate::Error>(self.keys.number(key)?.filter(|&x| x != 0.0));
        Ok(match (stated("mscale")?, stated("mscale_all_dim")?) {
            (Some(above), Some(below)) => mscale(factor, above) / mscale(factor, below),
            _ => mscale(factor, 1.0),
        })
    }

    /// See [`RopeSpec::softmax_factor`].
    fn softmax_factor(&self) -> Result<f64> {
        match self.keys.number("mscale_all_dim")? {
            Some(all) if all != 0.0 => Ok(mscale(self.factor()?, all).powi(2)),
            _ => Ok(1.0),
        }
    }

    fn longrope(&self) -> Result<ByLength> {
        let list = |key| -> Result<Vec<f32>> {
            let divided = powers(self.theta, self.dim).zip(self.divisors(key)?);
            Ok(divided.map(|(power, divisor)| 1.0 / (divisor * power)).collect())
        };
        Ok(ByLength::LongRope { original: self.original, short: list("short_factor")?, long: list("long_factor")? })
    }

    fn longrope_attention_factor(&self) -> Result<f64> {
        if let Some(stated) = self.keys.number("attention_factor")? {
            return Ok(stated);
        }
        let factor = self.factor()?;
        Ok(if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (self.original as f64).ln()).sqrt() })
    }
}

/// Long wavelengths are divided by `factor`, short ones stay, those between are blended.
pub(crate) struct Llama3 {
    pub(crate) factor: f32,
    pub(crate) low_freq_factor: f32,
    pub(crate) high_freq_factor: f32,
    pub(crate) original: f32,
}

impl Llama3 {
    fn read(keys: &Keys, original: usize) -> Result<Self> {
        Ok(Self {
            factor: keys.required_positive("factor")? as f32,
            low_freq_factor: keys.required_positive("low_freq_factor")? as f32,
            high_freq_factor: keys.required_positive("high_freq_factor")? as f32,
            original: original as f32,
        })
    }

    pub(crate) fn scale(&self, frequency: f32) -> f32 {
        let wavelength = (2.0 * PI) as f32 / frequency;
        if wavelength < self.original / self.high_freq_factor {
            return frequency;
        }
        if wavelength > self.original / self.low_freq_factor {
            return frequency / self.factor;
        }
        let band = self.high_freq_factor - self.low_freq_factor;
        // equal factors leave no band: the two tests above miss only its single point
        let smooth = if band == 0.0 { 1.0 } else { (self.original / wavelength - self.low_freq_factor) / band };
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}
