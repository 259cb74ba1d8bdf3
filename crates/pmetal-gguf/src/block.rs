use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;

/// A block format numbers are stored in: `block_size` numbers share a scale and take `type_size` bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockType {
    /// Its number in the file (`enum ggml_type`).
    id: u32,
    /// ggml's name.
    pub(crate) name: &'static str,
    codec: Codec,
}

/// What decodes a block.
#[derive(Debug, Clone, Copy)]
enum Codec {
    Candle(GgmlDType),
    Mxfp4,
}

const fn row(id: u32, name: &'static str, codec: GgmlDType) -> BlockType {
    BlockType { id, name, codec: Codec::Candle(codec) }
}

/// Every format candle has a decoder for, and GPT-OSS's.
const KNOWN: [BlockType; 16] = [
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
    BlockType { id: 39, name: "MXFP4", codec: Codec::Mxfp4 },
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
        match self.codec {
            Codec::Candle(codec) => codec.block_size(),
            Codec::Mxfp4 => MXFP4_NUMBERS,
        }
    }

    pub(crate) fn type_size(self) -> usize {
        match self.codec {
            Codec::Candle(codec) => codec.type_size(),
            Codec::Mxfp4 => MXFP4_BYTES,
        }
    }

    /// The numbers in whole blocks.
    pub(crate) fn decode(self, blocks: &[u8]) -> candle_core::Result<Vec<f32>> {
        let count = blocks.len() / self.type_size() * self.block_size();
        match self.codec {
            Codec::Mxfp4 => Ok(blocks.chunks_exact(MXFP4_BYTES).flat_map(decode_mxfp4).collect()),
            Codec::Candle(codec) => match codec.from_data(Cow::Borrowed(blocks)).dequantize(count)? {
                CpuStorage::F32(numbers) => Ok(numbers),
                _ => candle_core::bail!("{} decodes to something else than f32", self.name),
            },
        }
    }

    /// Bytes of a tensor of this shape (outermost dimension first). None when rows are no whole blocks, or it overflows.
    pub(crate) fn size_in_bytes(self, shape: &[u64]) -> Option<usize> {
        let block_size = self.block_size() as u64;
        if shape.last()? % block_size != 0 {
            return None;
        }
        let count = shape.iter().try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))?;
        let bytes = (count / block_size).checked_mul(self.type_size() as u64)?;
        // Twice: what is decoded from it is counted in f32 and must be countable too.
        count.checked_mul(4).and_then(|widened| usize::try_from(widened).ok())?;
        usize::try_from(bytes).ok()
    }
}

const MXFP4_NUMBERS: usize = 32;
/// A power of two that the block's numbers share, then half a byte each.
const MXFP4_BYTES: usize = 1 + MXFP4_NUMBERS / 2;
/// The exponent stored for a scale of 1.
const E8M0_BIAS: i32 = 127;
/// The numbers of two exponent bits and one of mantissa, behind a sign.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A block of the Open Compute Project's microscaling format. ggml puts the first sixteen numbers into the low halves of the bytes,
/// the others into the high ones.
fn decode_mxfp4(block: &[u8]) -> impl Iterator<Item = f32> {
    let (&exponent, halves) = block.split_first().unwrap_or((&0, &[]));
    // not in f32, whose smallest normal number the least scales are below
    let scale = f64::from(i32::from(exponent) - E8M0_BIAS).exp2();
    let number = move |code: u8| (f64::from(E2M1[usize::from(code & 0x0f)]) * scale) as f32;
    let low = halves.iter().map(move |&byte| number(byte));
    low.chain(halves.iter().map(move |&byte| number(byte >> 4)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code at the least scale, at 1, and at the largest whose numbers f32 holds.
    #[test]
    fn microscaled_numbers_are_exact() {
        let codes: Vec<u8> = (0..16).map(|low| low | (15 - low) << 4).collect();
        for (exponent, scale) in [(0, f32::MIN_POSITIVE / 2.0), (127, 1.0), (252, 2_f32.powi(125))] {
            let block = [&[exponent], codes.as_slice()].concat();
            let numbers = BlockType::from_id(39).unwrap().decode(&block).unwrap();
            let wanted = E2M1.iter().chain(E2M1.iter().rev()).map(|number| number * scale);
            assert_eq!(numbers, wanted.collect::<Vec<_>>());
        }
    }
}
