//! Which layers get an adapter, of which rank, and how PEFT is told.

use std::collections::HashSet;

use candle_core::Shape;
use pmetal_models::{DecoderSpec, linear_layers};

use crate::{
    Error, LoraConfig, Result, TargetModules,
    config::{last_part, names_module},
    experts::{DOWN, ExpertLayout, GATE_UP},
};

/// Projections of which no gradient knows, so that their adapters would stay as they start.
const WITHOUT_GRADIENT: &str = ".indexer.";

/// A linear layer that can have an adapter.
pub(crate) struct Layer {
    pub(crate) module: String,
    /// What PEFT calls it: where it is an expert's, the matrix of all experts.
    pub(crate) key: String,
    pub(crate) is_expert: bool,
    in_features: usize,
    out_features: usize,
}

/// A layer and what its adapter is like.
pub(crate) struct Target {
    pub(crate) layer: Layer,
    pub(crate) r: usize,
    pub(crate) scale: f32,
}

impl Layer {
    pub(crate) fn names(&self) -> [String; 2] {
        [format!("{}.lora_A.weight", self.module), format!("{}.lora_B.weight", self.module)]
    }

    /// Whether it is an expert's matrix that was two, for gate and for up.
    fn was_two(&self, experts: Option<&ExpertLayout>) -> bool {
        self.is_expert && last_part(&self.key) == GATE_UP && experts.is_some_and(|e| e.old_names().is_some())
    }

    /// With an adapter of the rank that the settings give it; twice that where `joined`.
    fn adapted(self, config: &LoraConfig, joined: bool) -> Target {
        let (r, alpha) = config.rank_and_alpha(&self.key, joined);
        Target { layer: self, r, scale: config.scale_of(r, alpha) }
    }
}

impl Target {
    pub(crate) fn shapes(&self) -> [Shape; 2] {
        [Shape::from((self.r, self.layer.in_features)), Shape::from((self.layer.out_features, self.r))]
    }

    /// Which side starts at random, 0 for A, and in which bounds.
    pub(crate) fn start(&self, experts: Option<&ExpertLayout>) -> (usize, f32) {
        let is_b = self.layer.is_expert && experts.is_some_and(ExpertLayout::sides_traded);
        let width = if is_b { self.layer.out_features } else { self.layer.in_features };
        (usize::from(is_b), 1.0 / (width as f32).sqrt())
    }
}

/// Every layer that can have an adapter.
pub(crate) fn layers(spec: &DecoderSpec) -> Result<Vec<Layer>> {
    let experts = ExpertLayout::of(spec);
    let layer = |(module, [out_features, in_features]): (String, [usize; 2])| {
        let of_all = experts.as_ref().and_then(|experts| experts.of_all(&module));
        let is_expert = of_all.is_some();
        Layer { key: of_all.unwrap_or_else(|| module.clone()), module, is_expert, in_features, out_features }
    };
    Ok(linear_layers(spec)?.into_iter().map(layer).collect())
}

/// The layers whose tensors `rank` knows, by the rank of their A; experts' gates and ups may have twice the rank that the settings say, as PEFT
/// gives them where they were two matrices. Where one expert has a matrix, all experts of its layer are there.
pub(crate) fn found(
    spec: &DecoderSpec,
    config: &LoraConfig,
    rank: impl Fn(&[String; 2]) -> Option<usize>,
) -> Result<Vec<Target>> {
    let experts = ExpertLayout::of(spec);
    let layers = layers(spec)?;
    let keys: HashSet<String> =
        layers.iter().filter(|layer| rank(&layer.names()).is_some()).map(|layer| layer.key.clone()).collect();
    let target = |layer: Layer| {
        let doubled = 2 * config.rank_and_alpha(&layer.key, false).0;
        let joined = layer.was_two(experts.as_ref()) && rank(&layer.names()) == Some(doubled);
        layer.adapted(config, joined)
    };
    Ok(layers.into_iter().filter(|layer| keys.contains(&layer.key)).map(target).collect())
}

/// The layers that fresh adapters go to.
///
/// PEFT takes the names that gate, up and down had while each expert was a module of its own for the experts' alone, and gives gate and up, now
/// one matrix, twice the rank. Any other name stands for modules that are called so, and for experts where there are none.
pub(crate) fn chosen(spec: &DecoderSpec, config: &LoraConfig) -> Result<Vec<Target>> {
    let (experts, layers) = (ExpertLayout::of(spec), layers(spec)?);
    let old = experts.as_ref().and_then(ExpertLayout::old_names);
    let (keys, joined): (HashSet<String>, bool) = match &config.target_modules {
        TargetModules::AllLinear => {
            let trained = layers.iter().filter(|layer| !layer.key.contains(WITHOUT_GRADIENT));
            (trained.map(|layer| layer.key.clone()).collect(), true)
        }
        TargetModules::Names(names) => {
            let named: Vec<_> = names.iter().map(|name| matching(&layers, old, name)).collect();
            let unmatched: Vec<String> =
                names.iter().zip(&named).filter(|(_, keys)| keys.is_empty()).map(|(name, _)| name.clone()).collect();
            if !unmatched.is_empty() || names.is_empty() {
                let known = layers.iter().map(|layer| last_part(&layer.key)).chain(old.into_iter().flatten());
                let mut seen = HashSet::new();
                let known = known.filter(|part| seen.insert(*part)).map(str::to_owned).collect();
                return Err(Error::NoTarget { targets: unmatched, known });
            }
            let joined = both_of_one(names, old)?;
            (named.into_iter().flatten().map(str::to_owned).collect(), joined)
        }
    };
    let adapted = |layer: Layer| {
        let joined = joined && layer.was_two(experts.as_ref());
        layer.adapted(config, joined)
    };
    Ok(layers.into_iter().filter(|layer| keys.contains(&layer.key)).map(adapted).collect())
}

/// The keys that a name stands for.
fn matching<'a>(layers: &'a [Layer], old: Option<[&str; 3]>, name: &str) -> Vec<&'a str> {
    let of = |experts: bool, name: &str| {
        let named = layers.iter().filter(|layer| layer.is_expert == experts && names_module(name, &layer.key));
        named.map(|layer| layer.key.as_str()).collect::<Vec<_>>()
    };
    if let Some(place) = old.and_then(|old| old.iter().position(|old| *old == name)) {
        return of(true, if place == 2 { DOWN } else { GATE_UP });
    }
    let modules = of(false, name);
    if modules.is_empty() { of(true, name) } else { modules }
}

/// Whether `names` has the old names of gate and up.
fn both_of_one(names: &[String], old: Option<[&str; 3]>) -> Result<bool> {
    let Some([gate, up, _]) = old else { return Ok(false) };
    let has = |part: &str| names.iter().any(|name| name == part);
    if has(gate) == has(up) {
        return Ok(has(gate));
    }
    let (got, expected) = (names.join(","), "both gate and up or neither: they are one matrix of each expert");
    Err(Error::Setting { key: "lora_target_modules", got, expected })
}

/// What PEFT is told of the adapted layers.
pub(crate) struct Listed {
    /// Modules.
    pub(crate) modules: Vec<String>,
    /// Parameters.
    pub(crate) parameters: Vec<String>,
    /// What became of [`LoraConfig`]'s patterns: the ranks and numerators of experts that have twice the rank.
    pub(crate) config: LoraConfig,
}

/// Names that fit the `targets` and no other layer, as short as can be; `outside` turns a model's name into PEFT's, where these differ.
///
/// Experts are parameters to PEFT. Modules that are called as experts once were are named as parameters too, for as modules PEFT would take them
/// for the experts. It refuses dropout for parameters, so the files then say 0.
pub(crate) fn listed(
    spec: &DecoderSpec,
    config: &LoraConfig,
    targets: &[Target],
    outside: Option<&dyn Fn(&str) -> String>,
) -> Result<Listed> {
    let experts = ExpertLayout::of(spec);
    let old = experts.as_ref().and_then(ExpertLayout::old_names);
    let all = layers(spec)?;
    let is_parameter = |layer: &Layer| layer.is_expert || old.is_some_and(|old| old.contains(&last_part(&layer.key)));
    // of a parameter the layers' names are too few: the last part of it may be that of a module elsewhere
    let named = |choose: &dyn Fn(&Layer) -> bool, ways: &[Shortening]| {
        let every: Vec<&str> = all.iter().filter(|layer| choose(layer)).map(|layer| layer.key.as_str()).collect();
        let adapted = targets.iter().map(|target| &target.layer).filter(|layer| choose(layer));
        let adapted: Vec<&str> = adapted.map(|layer| layer.key.as_str()).collect();
        match outside {
            Some(outside) => unique(adapted.into_iter().map(outside)),
            None => shortest(&adapted, &every, ways),
        }
    };
    let modules = named(&|layer| !is_parameter(layer), &[last_part, behind_layer]);
    let mut parameters = named(&|layer| layer.is_expert, &[behind_layer]);
    let matrices = named(&|layer| !layer.is_expert && is_parameter(layer), &[behind_layer]);
    parameters.extend(matrices.into_iter().map(|module| module + ".weight"));
    let mut config = config.clone();
    for target in targets.iter().filter(|t| t.layer.was_two(experts.as_ref())) {
        let plain = config.rank_and_alpha(&target.layer.key, false);
        if target.r != plain.0 {
            config.rank_pattern.insert(GATE_UP.to_owned(), target.r);
            config.alpha_pattern.insert(GATE_UP.to_owned(), 2.0 * plain.1);
        }
    }
    if !parameters.is_empty() {
        config.lora_dropout = 0.0;
    }
    Ok(Listed { modules, parameters, config })
}

/// A shorter name that fits a layer.
type Shortening = for<'a> fn(&'a str) -> &'a str;

/// `mlp.up_proj` of `model.layers.3.mlp.up_proj`.
fn behind_layer(name: &str) -> &str {
    name.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.')).map_or(name, |(_, part)| part)
}

/// Names that fit those of `adapted` and no other of `all`: for each the first of the `ways` that does, else the whole name.
fn shortest(adapted: &[&str], all: &[&str], ways: &[Shortening]) -> Vec<String> {
    let is_adapted: HashSet<&str> = adapted.iter().copied().collect();
    let others: Vec<HashSet<&str>> = ways
        .iter()
        .map(|way| all.iter().filter(|name| !is_adapted.contains(**name)).map(|name| way(name)).collect())
        .collect();
    let short = |name: &&str| {
        let fitting = ways.iter().zip(&others).map(|(way, others)| (way(name), others));
        fitting
            .filter(|(short, others)| !others.contains(short))
            .map(|(short, _)| short)
            .next()
            .unwrap_or(name)
            .to_owned()
    };
    unique(adapted.iter().map(short))
}

/// Without what came before.
fn unique(names: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen = HashSet::new();
    names.filter(|name| seen.insert(name.clone())).collect()
}
