use crate::{Error, GgufFile, Result};

/// What differs between the architectures a GGUF file can be of.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// `general.architecture`, the prefix of its metadata keys, and `model_type` in `config.json`.
    pub(crate) name: &'static str,
    /// The class in `config.json`.
    pub(crate) class: &'static str,
    /// Whether conversion reorders the rows of q and k: llama.cpp rotates neighbouring pairs for this one,
    /// the halves of a head for the others.
    pub(crate) pairs_adjacent: bool,
}

/// The architectures known, by the name in `general.architecture`.
pub const ARCHITECTURES: [&str; 3] = [KNOWN[0].name, KNOWN[1].name, KNOWN[2].name];

const KNOWN: [Architecture; 3] = [
    Architecture { name: "llama", class: "LlamaForCausalLM", pairs_adjacent: true },
    Architecture { name: "qwen2", class: "Qwen2ForCausalLM", pairs_adjacent: false },
    Architecture { name: "qwen3", class: "Qwen3ForCausalLM", pairs_adjacent: false },
];

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
        KNOWN.iter().find(|known| known.name == found).ok_or_else(|| Error::Unknown {
            path: self.path.clone(),
            what: "architecture",
            found: found.to_string(),
            known: ARCHITECTURES.join(", "),
        })
    }

    /// Attention heads; the second number is the first where the file does not say otherwise.
    pub(crate) fn heads(&self, architecture: &Architecture) -> Result<Heads> {
        let key = format!("{}.attention.head_count", architecture.name);
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
}
