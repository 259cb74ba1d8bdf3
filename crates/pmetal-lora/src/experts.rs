//! Adapters of experts: PEFT has one pair of matrices for all experts of a layer, the model one for each expert.
//!
//! PEFT's A, `[r * experts, in]`, has the rows of one expert together; its B, `[out, r * experts]`, has the columns of one rank together. Gate
//! and up, which are one matrix, are adapted inside the wrapper of down: `base_layer` in a name stands for them. Older files have three pairs for
//! each expert; gate's and up's are read as one of twice the rank, whose B has blocks on its diagonal.

use std::collections::BTreeMap;

use candle_core::Tensor;
use pmetal_models::{DecoderSpec, ExpertFiles, MlpSpec, in_halves, in_turn};

use crate::{Error, Result};

pub(crate) const GATE_UP: &str = "gate_up_proj";
pub(crate) const DOWN: &str = "down_proj";
const INNER: &str = "base_layer.";
const SIDES: [&str; 2] = ["lora_A.weight", "lora_B.weight"];

/// How a model's experts lie in files of adapters.
pub(crate) struct ExpertLayout {
    /// The experts' module in a layer.
    module: String,
    /// While each expert was a module of its own: what was before its number, and what gate, up and down were called.
    old: Option<(&'static str, [&'static str; 3])>,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    /// Whether rows of B belong to gate and up in turn.
    interleaved: bool,
    /// Whether PEFT takes a matrix for its transpose.
    sides_traded: bool,
}

/// What a name in a file stands for.
enum Place<'a> {
    /// All experts' matrices: of gate and up, or of whichever is the outer one.
    Together { layer: &'a str, is_inner: bool, side: usize },
    /// One matrix of one expert, by its old name.
    Old { layer: &'a str, expert: &'a str, part: usize, side: usize },
}

impl ExpertLayout {
    /// That of a model; none where no layer has experts.
    pub(crate) fn of(spec: &DecoderSpec) -> Option<Self> {
        let experts = spec.layers.iter().find_map(|layer| match &layer.mlp {
            MlpSpec::Experts(experts) => Some(experts),
            MlpSpec::Gated(_) => None,
        })?;
        let files = spec.names.experts;
        let interleaved = |files: &ExpertFiles| matches!(files, ExpertFiles::Fused { interleaved: true, .. });
        let old = files.iter().find_map(|files| match *files {
            ExpertFiles::Each { module, gate, up, down } => Some((module, [gate, up, down])),
            ExpertFiles::Fused { .. } | ExpertFiles::Stacked { .. } => None,
        });
        Some(Self {
            module: spec.names.of("mlp.experts"),
            old,
            experts: experts.router.experts,
            hidden: spec.hidden_size,
            intermediate: experts.expert.intermediate_size,
            interleaved: files.iter().any(interleaved),
            sides_traded: spec.names.sides_traded,
        })
    }

    /// What gate, up and down were called while each expert was a module of its own.
    pub(crate) fn old_names(&self) -> Option<[&'static str; 3]> {
        self.old.map(|(_, names)| names)
    }

    /// Whether B is what starts at random, for PEFT takes it for A.
    pub(crate) fn sides_traded(&self) -> bool {
        self.sides_traded
    }

    /// `model.layers.0.mlp.experts.3.down_proj` as the matrix of all experts, `model.layers.0.mlp.experts.down_proj`.
    pub(crate) fn of_all(&self, module: &str) -> Option<String> {
        let (layer, rest) = self.below(module, &self.module)?;
        let (_, matrix) = rest.split_once('.')?;
        Some(format!("{layer}{}.{matrix}", self.module))
    }

    /// `model.layers.N.` and what is behind `module` in the name.
    fn below<'a>(&self, name: &'a str, module: &str) -> Option<(&'a str, &'a str)> {
        let (index, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (layer, rest) = name.split_at("model.layers.".len() + index.len() + 1);
        Some((layer, rest.strip_prefix(module)?.strip_prefix('.')?))
    }

    fn place<'a>(&self, name: &'a str) -> Option<Place<'a>> {
        let side_of = |text: &str| SIDES.iter().position(|side| *side == text);
        let together = self.below(name, &self.module).and_then(|(layer, rest)| {
            let (is_inner, side) = rest.strip_prefix(INNER).map_or((false, rest), |side| (true, side));
            Some(Place::Together { layer, is_inner, side: side_of(side)? })
        });
        together.or_else(|| {
            let (module, names) = self.old?;
            let (layer, rest) = self.below(name, module)?;
            let (expert, rest) = rest.split_once('.')?;
            let (part, side) = rest.split_once('.')?;
            let part = names.iter().position(|name| *name == part)?;
            Some(Place::Old { layer, expert, part, side: side_of(side)? })
        })
    }

    /// The tensors of a file by the model's names, those of each expert apart.
    ///
    /// # Errors
    /// What `refuse` makes of a reason, where tensors of experts have shapes that are none of theirs.
    pub(crate) fn read(
        &self,
        tensors: &BTreeMap<String, Tensor>,
        refuse: &dyn Fn(String) -> Error,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut read = BTreeMap::new();
        for (name, tensor) in tensors {
            let Some(place) = self.place(name) else {
                read.insert(name.clone(), tensor.clone());
                continue;
            };
            if tensor.rank() != 2 {
                return Err(refuse(format!("{name} is {:?}, expected a matrix", tensor.dims())));
            }
            match place {
                Place::Together { layer, is_inner, side } => {
                    if !tensor.dims()[side].is_multiple_of(self.experts) {
                        let reason = format!("{name} is {:?}, this model has {} experts", tensor.dims(), self.experts);
                        return Err(refuse(reason));
                    }
                    let matrix = if is_inner || self.outer_is_gate_up(tensors, layer) { GATE_UP } else { DOWN };
                    self.part(layer, matrix, tensor, side, &mut read)?;
                }
                Place::Old { layer, expert, part, side } => {
                    let partner = |part: usize| {
                        let name = self.old_name(layer, expert, part, side);
                        tensors.get(&name).ok_or_else(|| refuse(format!("{name} is missing")))
                    };
                    let (matrix, tensor) = match part {
                        0 => (GATE_UP, joined(tensor, partner(1)?, side, refuse)?),
                        1 => {
                            partner(0)?;
                            continue;
                        }
                        _ => (DOWN, tensor.clone()),
                    };
                    read.insert(format!("{layer}{}.{expert}.{matrix}.{}", self.module, SIDES[side]), tensor);
                }
            }
        }
        Ok(read)
    }

    /// Adds what each expert has of a matrix of all.
    fn part(
        &self,
        layer: &str,
        matrix: &str,
        tensor: &Tensor,
        side: usize,
        to: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let (rows, columns) = tensor.dims2()?;
        for expert in 0..self.experts {
            let piece = if side == 0 {
                let r = rows / self.experts;
                tensor.narrow(0, expert * r, r)?
            } else {
                tensor.reshape((rows, columns / self.experts, self.experts))?.narrow(2, expert, 1)?.squeeze(2)?
            };
            let (side, piece) = self.turned(&piece, side)?;
            let piece = if self.takes_turns(matrix, side) { in_halves(&piece)? } else { piece };
            to.insert(format!("{layer}{}.{expert}.{matrix}.{}", self.module, SIDES[side]), piece.contiguous()?);
        }
        Ok(())
    }

    /// The tensors of a file, of those of the model: what [`ExpertLayout::read`] did is undone, but for old names.
    pub(crate) fn written(&self, tensors: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        let (mut written, mut together) = (Vec::new(), BTreeMap::<_, Vec<(usize, Tensor)>>::new());
        for (name, tensor) in tensors {
            let of_expert = self.below(&name, &self.module).and_then(|(layer, rest)| {
                let (expert, rest) = rest.split_once('.')?;
                let (matrix, side) = rest.split_once('.')?;
                let side = SIDES.iter().position(|known| *known == side)?;
                Some((layer.to_owned(), expert.parse::<usize>().ok()?, matrix == GATE_UP, side))
            });
            let Some((layer, expert, is_gate_up, side)) = of_expert else {
                written.push((name, tensor));
                continue;
            };
            let matrix = if is_gate_up { GATE_UP } else { DOWN };
            let tensor = if self.takes_turns(matrix, side) { in_turn(&tensor)? } else { tensor };
            let (side, tensor) = self.turned(&tensor, side)?;
            together.entry((layer, is_gate_up, side)).or_default().push((expert, tensor));
        }
        let has_down: Vec<String> =
            together.keys().filter(|(_, is_gate_up, _)| !is_gate_up).map(|(layer, ..)| layer.clone()).collect();
        for ((layer, is_gate_up, side), mut pieces) in together {
            pieces.sort_by_key(|(expert, _)| *expert);
            let pieces: Vec<Tensor> = pieces.into_iter().map(|(_, piece)| piece).collect();
            let all = if side == 0 { Tensor::cat(&pieces, 0)? } else { Tensor::stack(&pieces, 2)?.flatten_from(1)? };
            let inner = if is_gate_up && has_down.contains(&layer) { INNER } else { "" };
            written.push((format!("{layer}{}.{inner}{}", self.module, SIDES[side]), all.contiguous()?));
        }
        Ok(written)
    }

    /// Whether the layer's outer wrapper, which is down's where there are two, is that of gate and up, alone.
    fn outer_is_gate_up(&self, tensors: &BTreeMap<String, Tensor>, layer: &str) -> bool {
        let tensor = |inner: &str, side: usize| tensors.get(&format!("{layer}{}.{inner}{}", self.module, SIDES[side]));
        let (a, b) = (tensor("", 0), tensor("", 1));
        let [inputs, outputs] =
            if self.sides_traded { [2 * self.intermediate, self.hidden] } else { [self.hidden, 2 * self.intermediate] };
        tensor(INNER, 0).is_none()
            && a.is_some_and(|a| a.dims().last() == Some(&inputs))
            && b.is_some_and(|b| b.dims().first() == Some(&outputs))
    }

    /// The model's side of a file's, and the other way round.
    fn turned(&self, piece: &Tensor, side: usize) -> Result<(usize, Tensor)> {
        Ok(if self.sides_traded { (1 - side, piece.t()?) } else { (side, piece.clone()) })
    }

    fn takes_turns(&self, matrix: &str, side: usize) -> bool {
        self.interleaved && matrix == GATE_UP && side == 1
    }

    fn old_name(&self, layer: &str, expert: &str, part: usize, side: usize) -> String {
        let (module, names) = self.old.unwrap_or_default();
        format!("{layer}{module}.{expert}.{}.{}", names[part], SIDES[side])
    }
}

/// A side of gate and that of up, as one of twice the rank.
fn joined(gate: &Tensor, up: &Tensor, side: usize, refuse: &dyn Fn(String) -> Error) -> Result<Tensor> {
    if up.dims() != gate.dims() {
        return Err(refuse(format!(
            "{} of an expert's gate is {:?}, of its up {:?}",
            SIDES[side],
            gate.dims(),
            up.dims()
        )));
    }
    if side == 0 {
        return Ok(Tensor::cat(&[gate, up], 0)?);
    }
    let none = gate.zeros_like()?;
    Ok(Tensor::cat(&[Tensor::cat(&[gate, &none], 1)?, Tensor::cat(&[&none, up], 1)?], 0)?)
}
