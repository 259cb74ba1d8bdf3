use candle_core::quantized::GgmlDType;

/// A block format numbers are stored in: `block_size` numbers share a scale and take `type_size` bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockType {
    /// Its number in the file (`enum ggml_type`).
    id: u32,
    /// ggml's name.
    pub(crate) name: &'static str,
    pub(crate) codec: GgmlDType,
}

const fn row(id: u32, name: &'static str, codec: GgmlDType) -> BlockType {
    BlockType { id, name, codec }
}

/// Every format candle has a decoder for.
const KNOWN: [BlockType; 15] = [
    row(0, "F32", GgmlDType::F32),
    row(1, "F16", GgmlDType::F16),
    row(30, "BF16", GgmlDType::BF16),
    row(2, "Q4_0", GgmlDType::Q4_0),
    row(3, "Q4_1", GgmlDType::Q4_1),
    row(6, "Q5_0", GgmlDType::Q5_0),
    row(7, "Q5_1", GgmlDType::Q5_1),
    row(8, "Q8_0", GgmlDType::Q8_0),
    row(9, "Q8_1", GgmlDType::Q8_1),
    row(10, "Q2_K", GgmlDType::Q2K),
    row(11, "Q3_K", GgmlDType::Q3K),
    row(12, "Q4_K", GgmlDType::Q4K),
    row(13, "Q5_K", GgmlDType::Q5K),
    row(14, "Q6_K", GgmlDType::Q6K),
    row(15, "Q8_K", GgmlDType::Q8K),
];

impl BlockType {
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        KNOWN.into_iter().find(|known| known.id == id)
    }

    /// The names of all known formats, for a message.
    pub(crate) fn known() -> String {
        KNOWN.map(|known| known.name).join(", ")
    }

    pub(crate) fn block_size(self) -> usize {
        self.codec.block_size()
    }

    /// Bytes of a tensor of this shape (outermost dimension first). None when rows are no whole blocks, or it overflows.
    pub(crate) fn size_in_bytes(self, shape: &[u64]) -> Option<usize> {
        let block_size = self.block_size() as u64;
        if shape.last()? % block_size != 0 {
            return None;
        }
        let count = shape.iter().try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))?;
        let bytes = (count / block_size).checked_mul(self.codec.type_size() as u64)?;
        // Twice: what is decoded from it is counted in f32 and must be countable too.
        count.checked_mul(4).and_then(|widened| usize::try_from(widened).ok())?;
        usize::try_from(bytes).ok()
    }
}
