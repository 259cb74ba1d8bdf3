//! One file per family: from `config.json` to a [`DecoderSpec`].

pub(crate) mod cohere;
pub(crate) mod cohere2;
pub(crate) mod deepseek_v3;
pub(crate) mod deepseek_v32;
pub(crate) mod gemma2;
pub(crate) mod gemma3;
pub(crate) mod gpt_oss;
pub(crate) mod granite;
pub(crate) mod granitemoe;
pub(crate) mod llama;
pub(crate) mod llama4;
pub(crate) mod mistral;
pub(crate) mod mixtral;
pub(crate) mod phi3;
pub(crate) mod qwen2;
pub(crate) mod qwen3;
pub(crate) mod qwen3_moe;

use pmetal_ops::{Activation, AttentionSpec, LogitsSpec, Reach, RmsNorm, RopeLayout, RouterSpec, Scoring};

use crate::{
    AttentionBias, AttentionKind, DecoderSpec, ExpertsSpec, GatedSpec, HeadsSpec, LayerSpec, MlpSpec, NormPlaces,
    NormSpec, Result, RopeSpec, RopeUse, RouterBias,
    keys::Keys,
    names::{ExpertFiles, Names},
    rope_spec::RopeDefaults,
};

/// Wider than the head of any model, and small enough that its frequencies cost nothing.
const LARGEST_HEAD: usize = 1 << 16;

/// Experts of all layers together: more than those of any model, and so few that their names fit into memory.
const MOST_EXPERTS: usize = 1 << 15;

/// What a decoder's configuration means where it is silent.
struct Defaults {
    vocab_size: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    /// The key of a head's width, or of the part of it that turns.
    head_dim_key: &'static str,
    max_position_embeddings: usize,
    rope_theta: f64,
    /// Which of several ropes under `rope_parameters` is the first.
    rope_of: Option<&'static str>,
    /// Whether `partial_rotary_factor` counts, and `yarn` stands for `longrope`.
    partial_rotary: bool,
    tie_word_embeddings: bool,
    /// The key of the norms' epsilon, and its default.
    eps: (&'static str, f64),
    /// The key of the activation, what it has to say, and what that is.
    activation: (&'static str, &'static str, Activation),
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            vocab_size: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            head_dim_key: "head_dim",
            max_position_embeddings: 2048,
            rope_theta: 10_000.0,
            rope_of: None,
            partial_rotary: false,
            tie_word_embeddings: false,
            eps: ("rms_norm_eps", 1e-6),
            activation: ("hidden_act", "silu", Activation::Silu),
        }
    }
}

/// What all families state alike: the parts that a family changes where it differs.
struct Base {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
    activation: Activation,
    rope: RopeSpec,
    tie_word_embeddings: bool,
    max_position_embeddings: usize,
    initializer_range: f64,
}

impl Base {
    fn read(config: &Keys, defaults: Defaults) -> Result<Self> {
        let (key, name, activation) = defaults.activation;
        refuse_unsupported(config, key, name)?;
        let heads = or_required(config, "num_attention_heads", defaults.num_attention_heads)?;
        let hidden_size = config.required_size("hidden_size")?;
        // absent means the family's default, null one per query head
        let kv_default = if config.has("num_key_value_heads") { None } else { defaults.num_key_value_heads };
        let kv_heads = config.size("num_key_value_heads")?.or(kv_default).unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(config.wrong("num_key_value_heads", format!("{kv_heads} does not divide {heads} heads")));
        }
        let head_key = defaults.head_dim_key;
        let head_default = if config.has(head_key) { None } else { defaults.head_dim };
        let head_dim = config.size(head_key)?.or(head_default).unwrap_or(hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(config.wrong(head_key, format!("{head_dim} is not an even number above 0")));
        }
        if head_dim > LARGEST_HEAD {
            return Err(config.wrong(head_key, format!("{head_dim} is more than {LARGEST_HEAD}")));
        }
        let max_position_embeddings =
            config.size("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let rope_defaults = RopeDefaults {
            theta: defaults.rope_theta,
            partial: defaults.partial_rotary,
            yarn_is_longrope: defaults.partial_rotary,
        };
        let rope = match nested_rope(config, defaults.rope_of)? {
            Some(rope) => RopeSpec::read_from(Some(&rope), config, rope_defaults, head_dim, max_position_embeddings)?,
            None => RopeSpec::read(config, rope_defaults, head_dim, max_position_embeddings)?,
        };
        Ok(Self {
            vocab_size: or_required(config, "vocab_size", defaults.vocab_size)?,
            hidden_size,
            intermediate_size: config.required_size("intermediate_size")?,
            num_hidden_layers: layers(config)?,
            heads,
            kv_heads,
            head_dim,
            eps: epsilon(config, defaults.eps)?,
            activation,
            rope,
            tie_word_embeddings: config.boolean("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            max_position_embeddings,
            initializer_range: config.number("initializer_range")?.unwrap_or(0.02),
        })
    }

    /// A norm that rounds before its weight.
    fn norm(&self) -> RmsNorm {
        RmsNorm::new(self.eps)
    }

    /// Heads that see all before them, turned by the first rope.
    fn heads(&self) -> HeadsSpec {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        HeadsSpec {
            attention: AttentionSpec { heads, kv_heads, head_dim, scale, reach: Reach::All, softcap: None },
            bias: AttentionBias::default(),
            fused: false,
            head_norm: None,
            rope: Some(0),
            sinks: false,
            temperature: None,
        }
    }

    /// A gated MLP without biases.
    fn gated(&self) -> GatedSpec {
        let (intermediate_size, activation) = (self.intermediate_size, self.activation);
        GatedSpec { intermediate_size, bias: false, fused: false, activation }
    }

    /// Experts like [`Base::gated`], whose results `router` weights.
    fn experts(&self, router: RouterSpec) -> ExpertsSpec {
        let expert = GatedSpec { fused: true, ..self.gated() };
        ExpertsSpec { router, router_bias: RouterBias::Absent, expert, scale_input: false, shared: None }
    }

    /// A layer of [`Base::heads`] and [`Base::gated`], each behind a norm.
    fn layer(&self) -> LayerSpec {
        LayerSpec {
            attention: AttentionKind::Heads(self.heads()),
            mlp: MlpSpec::Gated(self.gated()),
            norms: NormPlaces::Before,
            residual_multiplier: 1.0,
        }
    }

    /// The rope that the configuration states, for whole heads, half-split.
    fn rope(&self) -> RopeUse {
        RopeUse { rope: self.rope.clone(), layout: RopeLayout::whole(self.head_dim) }
    }

    /// A further rope, whose settings stand apart under `kind` if anywhere.
    fn other_rope(&self, config: &Keys, kind: &'static str, theta: f64) -> Result<RopeUse> {
        let (settings, defaults) =
            (nested_rope(config, Some(kind))?, RopeDefaults { theta, ..RopeDefaults::default() });
        let (width, context) = (self.head_dim, self.max_position_embeddings);
        let rope = RopeSpec::read_from(settings.as_ref(), config, defaults, width, context)?;
        Ok(RopeUse { rope, layout: RopeLayout::whole(width) })
    }

    /// The decoder of these layers.
    fn decoder(&self, layers: Vec<LayerSpec>) -> DecoderSpec {
        DecoderSpec {
            model_type: String::new(),
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers,
            ropes: vec![self.rope()],
            norm: NormSpec::Rms(self.norm()),
            embedding_multiplier: 1.0,
            logits: LogitsSpec::default(),
            router_loss: None,
            tie_word_embeddings: self.tie_word_embeddings,
            max_position_embeddings: self.rope.context(self.max_position_embeddings),
            initializer_range: self.initializer_range,
            names: Names::default(),
        }
    }

    /// One layer after another.
    fn layers(&self, layer: impl FnMut(usize) -> LayerSpec) -> Vec<LayerSpec> {
        (0..self.num_hidden_layers).map(layer).collect()
    }

    /// Whether each layer is of the second of two kinds, by the list under `key`, or where there is none by `silent`.
    fn kinds(&self, config: &Keys, key: &str, kinds: [&str; 2], silent: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let layers = self.num_hidden_layers;
        let Some(stated) = config.texts(key)? else { return Ok((0..layers).map(silent).collect()) };
        if stated.len() != layers {
            return Err(config.wrong(key, format!("has {} entries for {layers} layers", stated.len())));
        }
        let is_second = |kind: &&str| match kinds.iter().position(|known| known == kind) {
            Some(place) => Ok(place == 1),
            None => Err(config.refuse(key, format!("{kind} is not supported; choose another model"))),
        };
        stated.iter().map(is_second).collect()
    }

    /// What each layer's queries see: a window of `window` keys where `layer_types` says so, or `slides` where that is absent.
    fn reaches(&self, config: &Keys, window: Option<usize>, slides: impl Fn(usize) -> bool) -> Result<Vec<Reach>> {
        let slides = self.kinds(config, "layer_types", ["full_attention", "sliding_attention"], slides)?;
        let reach = |slides: bool| window.filter(|_| slides).map_or(Reach::All, Reach::Window);
        Ok(slides.into_iter().map(reach).collect())
    }
}

/// The settings of one of several ropes, where they stand apart.
fn nested_rope<'a>(config: &Keys<'a>, kind: Option<&'static str>) -> Result<Option<Keys<'a>>> {
    match (kind, config.object("rope_parameters")?) {
        (Some(kind), Some(ropes)) => ropes.object(kind),
        _ => Ok(None),
    }
}

fn or_required(config: &Keys, key: &str, default: Option<usize>) -> Result<usize> {
    match default {
        Some(default) => Ok(config.size(key)?.unwrap_or(default)),
        None => config.required_size(key),
    }
}

/// A softmax over `top_k` of so many experts, which one of `keys` states: the weights of those that are picked sum to one.
fn router(config: &Keys, keys: &[&str], (experts, top_k): (usize, usize)) -> Result<RouterSpec> {
    let stated = keys.iter().find(|key| config.has(key));
    let experts = stated.map_or(Ok(None), |key| config.size(key))?.unwrap_or(experts);
    let top_k = config.size("num_experts_per_tok")?.unwrap_or(top_k);
    let most = MOST_EXPERTS / layers(config)?;
    if experts > most {
        let key = stated.or(keys.first()).copied().unwrap_or_default();
        return Err(config.wrong(key, format!("{experts} is more than {most}")));
    }
    if top_k > experts {
        return Err(config.wrong("num_experts_per_tok", format!("{top_k} of {experts} experts")));
    }
    Ok(RouterSpec { experts, top_k, scoring: Scoring::Softmax, renormalise: true, groups: None, scale: 1.0 })
}

/// The coefficient of the routers' balancing loss, where the configuration asks for it.
fn router_loss(config: &Keys, default: f64) -> Result<Option<f64>> {
    let asked = config.boolean("output_router_logits")?.unwrap_or(false);
    Ok(if asked { Some(config.number("router_aux_loss_coef")?.unwrap_or(default)) } else { None })
}

/// Experts in the files of most families, and as transformers has them in memory.
const EXPERTS: &[ExpertFiles] = &[
    ExpertFiles::Each { module: "mlp.experts", gate: "gate_proj", up: "up_proj", down: "down_proj" },
    FUSED,
    stacked("mlp.experts"),
];

/// Experts in GGUF files.
const fn stacked(module: &'static str) -> ExpertFiles {
    ExpertFiles::Stacked { module, gate: "gate_proj", up: "up_proj", down: "down_proj" }
}

/// Experts as transformers has them in memory.
const FUSED: ExpertFiles = ExpertFiles::Fused {
    gate_up: "mlp.experts.gate_up_proj",
    down: "mlp.experts.down_proj",
    transposed: false,
    interleaved: false,
};

/// Keys that a query of a sliding layer sees; none where it is null.
fn sliding_window(config: &Keys, default: usize) -> Result<Option<usize>> {
    Ok(if config.has("sliding_window") { config.size("sliding_window")? } else { Some(default) })
}

fn epsilon(config: &Keys, (key, default): (&'static str, f64)) -> Result<f64> {
    let epsilon = config.number(key)?.unwrap_or(default);
    if epsilon < 0.0 {
        return Err(config.refuse(key, format!("{epsilon} is below 0; restore the model's own file")));
    }
    Ok(epsilon)
}

fn layers(config: &Keys) -> Result<usize> {
    let layers = config.required_size("num_hidden_layers")?;
    if layers > 1024 {
        return Err(config.wrong("num_hidden_layers", format!("{layers} is more than 1024")));
    }
    Ok(layers)
}

/// What would change the numbers and is not there: refused by name.
fn refuse_unsupported(config: &Keys, activation: &'static str, wanted: &str) -> Result<()> {
    if let Some(found) = config.text(activation)?.filter(|&found| found != wanted) {
        return Err(config.refuse(activation, format!("{found} is not supported, only {wanted}; choose another model")));
    }
    let Some(quantization) = config.object("quantization_config")? else { return Ok(()) };
    match quantization.text("quant_method")? {
        Some("fp8" | "mxfp4") => Ok(()),
        other => Err(config.refuse(
            "quantization_config",
            format!(
                "{} weights are not supported, only fp8 and mxfp4; use the unquantized model or a GGUF file",
                other.unwrap_or("quantized")
            ),
        )),
    }
}
