use serde_json::json;

use crate::config::Config;
use crate::families::KNOWN;
use crate::{Error, GgufFile, Result};

/// Two names of one thing: llama.cpp's, and Hugging Face's.
pub(crate) type Pair = (&'static str, &'static str);

/// What differs between the architectures a GGUF file can be of. The metadata keys here stand behind [`Self::name`] and a dot.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// `general.architecture`, the prefix of its metadata keys.
    pub(crate) name: &'static str,
    /// `model_type` in `config.json`.
    pub(crate) model_type: &'static str,
    /// The class in `config.json`.
    pub(crate) class: &'static str,
    /// Whether the model has experts: two architectures may share a name, one with and one without.
    pub(crate) experts: bool,
    /// Tensors of a layer, as [`crate::names`] reads them.
    pub(crate) layer: &'static [&'static [Pair]],
    /// Tensors that are tables, not weights: the configuration carries what they say.
    pub(crate) tables: &'static [&'static str],
    /// Whether conversion reorders the rows of q and k: llama.cpp rotates neighbouring pairs for this one, Hugging Face the halves
    /// of a head.
    pub(crate) pairs_adjacent: bool,
    /// Whether a norm's weight is stored with one added to it.
    pub(crate) norms_plus_one: bool,
    /// The norms' epsilon.
    pub(crate) epsilon: Pair,
    /// The key of the activation in `config.json`, and its name.
    pub(crate) activation: (&'static str, &'static str),
    /// Further numbers the file must have.
    pub(crate) needed: &'static [Pair],
    /// Further numbers the file may lack: the class's own then apply.
    pub(crate) numbers: &'static [Pair],
    /// Sets the keys about the size of heads.
    pub(crate) heads: fn(&mut Config) -> Result<()>,
    /// Sets what no table says, at the end.
    pub(crate) more: fn(&mut Config) -> Result<()>,
}

impl Architecture {
    /// An architecture with nothing particular about it.
    pub(crate) const PLAIN: Self = Self {
        name: "",
        model_type: "",
        class: "",
        experts: false,
        layer: &[],
        tables: &["rope_freqs", "attn_rot_embd"],
        pairs_adjacent: false,
        norms_plus_one: false,
        epsilon: ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        activation: ("hidden_act", "silu"),
        needed: &[],
        numbers: &[],
        heads: equal_heads,
        more: |_| Ok(()),
    };

    /// A key of the metadata.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }
}

/// Keys and values of one size, all of which is rotated.
fn equal_heads(config: &mut Config) -> Result<()> {
    let head_dim = config.head_dim()?;
    config.refuse_other("rope.dimension_count", head_dim)?;
    config.set("head_dim", json!(head_dim));
    Ok(())
}

/// The architectures known, by the names in `general.architecture`; one that has two forms stands there twice.
pub const ARCHITECTURES: [&str; KNOWN.len()] = {
    let mut names = [""; KNOWN.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = KNOWN[index].name;
        index += 1;
    }
    names
};

/// The architectures whose GGUF files come out as models of this `model_type`.
pub fn architectures_of(model_type: &str) -> Vec<&'static str> {
    KNOWN.iter().filter(|known| known.model_type == model_type).map(|known| known.name).collect()
}

/// Counts out of the metadata that weights and configuration both need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) query: u64,
    pub(crate) key_value: u64,
}

impl GgufFile {
    pub(crate) fn architecture(&self) -> Result<&'static Architecture> {
        let key = "general.architecture";
        let found = self.required(key, self.string(key)?)?;
        let mut named = KNOWN.iter().filter(|known| known.name == found).peekable();
        if named.peek().is_none() {
            let mut known = ARCHITECTURES.to_vec();
            known.dedup();
            return Err(Error::Unknown {
                path: self.path.clone(),
                what: "architecture",
                found: found.to_string(),
                known: known.join(", "),
            });
        }
        let experts = self.unsigned(&format!("{found}.expert_count"))?.unwrap_or(0);
        named.find(|known| known.experts == (experts > 0)).ok_or_else(|| {
            let with = if experts > 0 { format!("a mixture of {experts} experts") } else { "no experts".to_string() };
            self.unsupported(format!("{with} in architecture '{found}'"))
        })
    }

    /// Attention heads; the second number is the first where the file does not say otherwise.
    pub(crate) fn heads(&self, architecture: &Architecture) -> Result<Heads> {
        let key = architecture.key("attention.head_count");
        let query = self.required(&key, self.unsigned(&key)?)?;
        let key_value_key = format!("{key}_kv");
        let key_value = self.unsigned(&key_value_key)?.unwrap_or(query);
        for (key, count) in [(key, query), (key_value_key, key_value)] {
            if count == 0 {
                return Err(self.malformed(format!("metadata key '{key}'"), "at least 1", count));
            }
        }
        Ok(Heads { query, key_value })
    }

    /// Layers of the decoder. Those behind them predict further tokens and are no part of it.
    pub(crate) fn layers(&self, architecture: &Architecture) -> Result<u64> {
        let key = architecture.key("block_count");
        let blocks = self.required(&key, self.unsigned(&key)?)?;
        let predicting = self.unsigned(&architecture.key("nextn_predict_layers"))?.unwrap_or(0);
        match blocks.checked_sub(predicting) {
            Some(layers) if layers > 0 => Ok(layers),
            _ => Err(self.malformed(format!("metadata key '{key}'"), format!("more than {predicting}"), blocks)),
        }
    }
}
