//! One file per family: from `config.json` to a [`DecoderSpec`].

pub(crate) mod llama;
pub(crate) mod qwen2;
pub(crate) mod qwen3;

use crate::{AttentionBias, DecoderSpec, Result, RopeSpec, keys::Keys, rope_spec::RopeDefaults};

/// Wider than the head of any model, and small enough that its frequencies cost nothing.
const LARGEST_HEAD: usize = 1 << 16;

/// What a dense decoder's configuration means where it is silent.
struct Defaults {
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
}

/// Reads what all dense families state alike. Biases and norms of q and k are the family's to add.
fn dense(config: &Keys, defaults: Defaults) -> Result<DecoderSpec> {
    refuse_unsupported(config)?;
    let heads = config.required_size("num_attention_heads")?;
    let hidden_size = config.required_size("hidden_size")?;
    // absent means the family's default, null one per query head
    let kv_default = if config.has("num_key_value_heads") { None } else { defaults.num_key_value_heads };
    let kv_heads = config.size("num_key_value_heads")?.or(kv_default).unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.refuse("num_key_value_heads", format!("{kv_heads} does not divide {heads} heads")));
    }
    let head_default = if config.has("head_dim") { None } else { defaults.head_dim };
    let head_dim = config.size("head_dim")?.or(head_default).unwrap_or(hidden_size / heads);
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(config.refuse("head_dim", format!("{head_dim} is not an even number above 0")));
    }
    if head_dim > LARGEST_HEAD {
        return Err(config.refuse("head_dim", format!("{head_dim} is more than {LARGEST_HEAD}")));
    }
    let max_positions = config.size("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
    Ok(DecoderSpec {
        model_type: String::new(),
        vocab_size: config.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: config.required_size("intermediate_size")?,
        num_hidden_layers: layers(config)?,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        rms_norm_eps: epsilon(config)?,
        rope: RopeSpec::read(config, RopeDefaults::default(), head_dim, max_positions)?,
        attention_bias: AttentionBias::default(),
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: config.boolean("tie_word_embeddings")?.unwrap_or(false),
        max_position_embeddings: max_positions,
        initializer_range: config.number("initializer_range")?.unwrap_or(0.02),
    })
}

fn epsilon(config: &Keys) -> Result<f64> {
    let epsilon = config.number("rms_norm_eps")?.unwrap_or(1e-6);
    if epsilon < 0.0 {
        return Err(config.refuse("rms_norm_eps", format!("{epsilon} is below 0; restore the model's own file")));
    }
    Ok(epsilon)
}

fn layers(config: &Keys) -> Result<usize> {
    let layers = config.required_size("num_hidden_layers")?;
    if layers > 4096 {
        return Err(config.refuse("num_hidden_layers", format!("{layers} is more than 4096")));
    }
    Ok(layers)
}

/// What would change the numbers and is not there: refused by name.
fn refuse_unsupported(config: &Keys) -> Result<()> {
    if let Some(act) = config.text("hidden_act")?.filter(|&act| act != "silu") {
        return Err(config.refuse("hidden_act", format!("{act} is not supported, only silu; choose another model")));
    }
    if config.number("attention_dropout")?.is_some_and(|p| p != 0.0) {
        return Err(config.refuse("attention_dropout", "is not supported, set it to 0"));
    }
    if config.object("quantization_config")?.is_some() {
        return Err(config.refuse(
            "quantization_config",
            "quantized weights are not supported here; use the unquantized model or a GGUF file",
        ));
    }
    Ok(())
}

/// Refuses layers that see a window of the context only. Qwen's files carry the window's keys whether it is used or not: `layer_types` says
/// which layers slide, and without it those from `max_window_layers` on do, where `use_sliding_window` is true.
fn refuse_sliding_windows(config: &Keys, layers: usize) -> Result<()> {
    if let Some(kind) =
        config.texts("layer_types")?.unwrap_or_default().into_iter().find(|&kind| kind != "full_attention")
    {
        return Err(
            config.refuse("layer_types", format!("{kind} is not supported, only full_attention; choose another model"))
        );
    }
    let window = config.whole("sliding_window")?.or((!config.has("sliding_window")).then_some(4096));
    let used = config.boolean("use_sliding_window")?.unwrap_or(false) && window.is_some();
    let full_layers = config.whole("max_window_layers")?.unwrap_or(28);
    if used && !config.has("layer_types") && (layers as u64) > full_layers {
        return Err(config
            .refuse("use_sliding_window", "attention over a sliding window is not supported; choose another model"));
    }
    Ok(())
}
