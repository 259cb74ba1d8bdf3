//! Where a decoder's tensors lie in files.

use candle_core::Tensor;

use crate::{
    DecoderSpec,
    names::{ExpertFiles, LAYERS},
};

/// A decoder's tensor in terms of a file's: pieces one behind another along the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) pieces: Vec<Piece>,
    /// Whether the file has the rows of the two halves in turn.
    pub(crate) interleaved: bool,
}

/// A file's tensor, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) name: String,
    /// Where one of those that the first dimension counts: which, and of how many.
    pub(crate) expert: Option<(usize, usize)>,
    /// Whether the last two dimensions are the other way round.
    pub(crate) transposed: bool,
}

impl Stored {
    fn whole(name: &str) -> Self {
        let piece = Piece { name: name.to_owned(), expert: None, transposed: false };
        Self { pieces: vec![piece], interleaved: false }
    }

    /// The pieces, and the dimensions that each has in its file, where the tensor has `dims`.
    pub(crate) fn shapes(&self, dims: &[usize]) -> impl Iterator<Item = (&Piece, Vec<usize>)> {
        let mut of_piece = dims.to_vec();
        if let Some(rows) = of_piece.first_mut() {
            *rows /= self.pieces.len().max(1);
        }
        self.pieces.iter().map(move |piece| {
            let mut dims = of_piece.clone();
            if piece.transposed {
                dims.reverse();
            }
            (piece, piece.expert.iter().map(|&(_, experts)| experts).chain(dims).collect())
        })
    }
}

/// The ways in which files hold the decoder's tensor `name`; the first is the one that is written.
pub(crate) fn stored(spec: &DecoderSpec, name: &str) -> Vec<Stored> {
    let Some(place) = ExpertPlace::of(spec, name) else {
        let called_otherwise = spec.names.in_files(name);
        return called_otherwise.iter().map(String::as_str).chain([name]).map(Stored::whole).collect();
    };
    spec.names.experts.iter().map(|files| place.stored(files)).collect()
}

/// A tensor of one expert.
struct ExpertPlace<'a> {
    /// `model.layers.N.`
    layer: &'a str,
    expert: usize,
    experts: usize,
    is_down: bool,
    /// `weight` or `bias`.
    kind: &'a str,
}

impl<'a> ExpertPlace<'a> {
    fn of(spec: &DecoderSpec, name: &'a str) -> Option<Self> {
        let experts = spec.router()?.experts;
        let (index, rest) = name.strip_prefix(LAYERS)?.split_once('.')?;
        let layer = &name[..LAYERS.len() + index.len() + 1];
        let module = spec.names.of("mlp.experts");
        let (expert, rest) = rest.strip_prefix(&module)?.strip_prefix('.')?.split_once('.')?;
        let (matrix, kind) = rest.split_once('.')?;
        Some(Self { layer, expert: expert.parse().ok()?, experts, is_down: matrix == "down_proj", kind })
    }

    fn stored(&self, files: &ExpertFiles) -> Stored {
        let Self { layer, expert, kind, .. } = self;
        let halves = |gate: &'static str, up, down| if self.is_down { vec![down] } else { vec![gate, up] };
        let (names, interleaved, transposed): (Vec<String>, _, _) = match *files {
            ExpertFiles::Each { module, gate, up, down } => {
                let name = |part| format!("{layer}{module}.{expert}.{part}.{kind}");
                (halves(gate, up, down).into_iter().map(name).collect(), false, false)
            }
            ExpertFiles::Fused { gate_up, down, transposed, interleaved } => {
                let part = if self.is_down { down } else { gate_up };
                let is_bias = *kind == "bias";
                let name = if is_bias { format!("{layer}{part}_bias") } else { format!("{layer}{part}") };
                (vec![name], interleaved && !self.is_down, transposed && !is_bias)
            }
            ExpertFiles::Stacked { module, gate, up, down } => {
                let name = |part| format!("{layer}{module}.{part}.{kind}");
                (halves(gate, up, down).into_iter().map(name).collect(), false, false)
            }
        };
        let each = matches!(files, ExpertFiles::Each { .. });
        let at = (!each).then_some((self.expert, self.experts));
        let piece = |name| Piece { name, expert: at, transposed };
        Stored { pieces: names.into_iter().map(piece).collect(), interleaved }
    }
}

/// The rows of the two halves of `tensor` in turn: of gate and up, as some files have them.
pub fn in_turn(tensor: &Tensor) -> candle_core::Result<Tensor> {
    regrouped(tensor, |rows| [2, rows / 2])
}

/// Every other row of `tensor` before the rows between them: what [`in_turn`] did is undone.
pub fn in_halves(tensor: &Tensor) -> candle_core::Result<Tensor> {
    regrouped(tensor, |rows| [rows / 2, 2])
}

fn regrouped(tensor: &Tensor, groups: impl Fn(usize) -> [usize; 2]) -> candle_core::Result<Tensor> {
    let shape = tensor.dims().to_vec();
    let Some((&rows, width)) = shape.split_first() else { return Ok(tensor.clone()) };
    let grouped: Vec<usize> = groups(rows).into_iter().chain(width.iter().copied()).collect();
    tensor.reshape(grouped)?.transpose(0, 1)?.contiguous()?.reshape(shape)
}
