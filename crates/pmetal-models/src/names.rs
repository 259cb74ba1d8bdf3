//! The names of a decoder's parts, and where its tensors lie in files.

/// The embedding, `[vocab_size, hidden_size]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm";
/// The head, `[vocab_size, hidden_size]`, of models where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";
/// The prefix of layer names.
pub(crate) const LAYERS: &str = "model.layers.";

/// What a family calls the parts of a layer, and how its files hold experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Parts that are not called as in Hugging Face's Llama: the part there, and here. A part stands for everything below it; the first that fits counts.
    pub parts: &'static [(&'static str, &'static str)],
    /// Parts that files call otherwise than the modules are called: the module's part, the files' part.
    pub files: &'static [(&'static str, &'static str)],
    /// How experts lie in files; the first way is the one that is written, the others are read too. Names are those of parts.
    pub experts: &'static [ExpertFiles],
    /// Whether PEFT takes the matrices of experts for their transposes, so that its A is the B of here.
    pub sides_traded: bool,
}

/// How files hold the matrices of a layer's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertFiles {
    /// Each expert's three matrices by themselves: `MODULE.N.GATE.weight` and so on.
    Each {
        /// What is before the expert's number.
        module: &'static str,
        /// `[intermediate, hidden]`.
        gate: &'static str,
        /// `[intermediate, hidden]`.
        up: &'static str,
        /// `[hidden, intermediate]`.
        down: &'static str,
    },
    /// All experts' gates and ups in one tensor, all downs in another.
    Fused {
        /// `[experts, 2 * intermediate, hidden]`.
        gate_up: &'static str,
        /// `[experts, hidden, intermediate]`.
        down: &'static str,
        /// Whether the last two dimensions are the other way round.
        transposed: bool,
        /// Whether gates and ups take turns, instead of all gates coming first.
        interleaved: bool,
    },
    /// All experts' gates in one tensor, ups in another, downs in a third, as GGUF files have them: `MODULE.GATE.weight` and so on.
    Stacked {
        /// What is before the names.
        module: &'static str,
        /// `[experts, intermediate, hidden]`.
        gate: &'static str,
        /// `[experts, intermediate, hidden]`.
        up: &'static str,
        /// `[experts, hidden, intermediate]`.
        down: &'static str,
    },
}

impl Names {
    /// The module of a part of a layer.
    pub fn of(&self, part: &str) -> String {
        renamed(self.parts, part).unwrap_or_else(|| part.to_owned())
    }

    /// What files call the tensor `name`, where they call it otherwise.
    pub(crate) fn in_files(&self, name: &str) -> Option<String> {
        let (layer, part) = name.strip_prefix(LAYERS)?.split_once('.')?;
        Some(format!("{LAYERS}{layer}.{}", renamed(self.files, part)?))
    }
}

/// `part` with its first parts replaced by what stands beside them in the first row that fits.
fn renamed(table: &[(&str, &str)], part: &str) -> Option<String> {
    table.iter().find_map(|(from, to)| {
        let below = part.strip_prefix(from)?;
        (below.is_empty() || below.starts_with('.')).then(|| format!("{to}{below}"))
    })
}

/// Whether a tensor is no parameter but a table of numbers that the model is run with, in f32 whatever the rest is in.
pub fn stays_f32(name: &str) -> bool {
    name.ends_with(".e_score_correction_bias")
}
