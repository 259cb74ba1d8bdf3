//! DeepSeek V3.2 and V3.2-Speciale: DeepSeek V3 whose queries see the keys that an indexer picks.

use pmetal_ops::RopeLayout;

use super::deepseek_v3::{base, decoder, latent};
use crate::{DecoderSpec, IndexerSpec, LatentSpec, Result, RopeUse, keys::Keys};

/// The indexer's rope.
const INDEX_ROPE: usize = 2;

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = base(config, 163_840)?;
    let head_dim = config.size("index_head_dim")?.unwrap_or(128);
    if head_dim < base.head_dim {
        return Err(config.wrong("index_head_dim", format!("{head_dim} is less than qk_rope_head_dim")));
    }
    let indexer = IndexerSpec {
        heads: config.size("index_n_heads")?.unwrap_or(64),
        head_dim,
        top_k: config.size("index_topk")?.unwrap_or(2048),
        rope: INDEX_ROPE,
    };
    let latent = LatentSpec { indexer: Some(indexer), ..latent(config, &base)? };
    if latent.q_lora_rank.is_none() {
        return Err(config.wrong("q_lora_rank", "is needed by the indexer".into()));
    }
    let mut decoder = decoder(config, &base, latent, true)?;
    let layout = RopeLayout { head_dim, start: 0, interleaved: false };
    decoder.ropes.push(RopeUse { rope: base.rope.clone(), layout });
    Ok(decoder)
}
