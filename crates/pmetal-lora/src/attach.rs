//! From settings or a file to adapters on a model's layers.

use std::collections::BTreeSet;

use candle_core::{Device, Shape, Tensor};
use pmetal_models::{CausalLMModel, DecoderSpec, linear_layers};
use pmetal_ops::{Adapter, Arena, Weight, device, random};

use crate::{
    AdapterFile, Error, LoraConfig, ModulesToSave, Result, TargetModules,
    config::{last_parts, names_module},
    tables,
};

/// What a loaded adapter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Its tensors go to an arena.
    Training,
    /// Its tensors are frozen, and there is no dropout.
    Inference,
}

/// A layer that gets an adapter.
struct Target {
    module: String,
    in_features: usize,
    out_features: usize,
}

impl Target {
    fn names(&self) -> [String; 2] {
        [format!("{}.lora_A.weight", self.module), format!("{}.lora_B.weight", self.module)]
    }

    fn shapes(&self, r: usize) -> [Shape; 2] {
        [Shape::from((r, self.in_features)), Shape::from((self.out_features, r))]
    }
}

/// Takes every adapter off a model.
pub fn detach(model: &mut dyn CausalLMModel) -> Result<()> {
    Ok(model.for_each_linear(&mut |_, member| member.adapter = None)?)
}

/// Gives every target layer a fresh adapter: A uniform in `±1 / sqrt(in)` as PEFT's Kaiming start, B zero. Returns their arena, in which
/// are also the tables that are trained in full.
pub fn attach(model: &mut dyn CausalLMModel, config: &LoraConfig, seed: u64) -> Result<Arena> {
    config.validate()?;
    let targets = targets(model, &config.target_modules)?;
    let arena = arena_for(model, &targets, config.r, config.modules_to_save)?;
    tables::train_tables(model, &arena)?;
    for (place, target) in targets.iter().enumerate() {
        let seed = random::mix(seed, &[place as u64]);
        let bound = 1.0 / (target.in_features as f32).sqrt();
        let a: Vec<f32> = (0..(config.r * target.in_features) as u64)
            .map(|i| (random::uniform(seed, i) * 2.0 - 1.0) * bound)
            .collect();
        let a = Tensor::from_vec(a, (config.r, target.in_features), &Device::Cpu)?;
        let [name, _] = target.names();
        if let Some(param) = arena.param(&name) {
            param.set(&a)?;
        }
    }
    put(model, &targets, config, |name| arena.param(name).map(Weight::Trainable))?;
    Ok(arena)
}

/// Puts an adapter from disk on a model in the place of one that was there, and the tables it carries in place of the model's. For training, its tensors go to the arena
/// that is returned; the tables are trained on, and those its settings name that it does not carry start as the model's.
pub fn attach_file(model: &mut dyn CausalLMModel, file: &AdapterFile, purpose: Use) -> Result<Option<Arena>> {
    let other = |reason: String| Error::OtherModel {
        path: file.path.clone(),
        reason,
        base: if file.base.is_empty() { "an unnamed model".into() } else { file.base.clone() },
    };
    let targets: Vec<Target> = all_layers(model.spec())?
        .into_iter()
        .filter(|t| t.names().iter().any(|name| file.tensors.contains_key(name)))
        .collect();
    let carried = tables::put_tables(model, file, other)?;
    let mut known: BTreeSet<String> = carried.tensors().map(str::to_owned).collect();
    for target in &targets {
        for (name, shape) in target.names().into_iter().zip(target.shapes(file.config.r)) {
            match file.tensors.get(&name) {
                None => return Err(other(format!("{name} is missing"))),
                Some(t) if t.shape() != &shape => {
                    return Err(other(format!("{name} is {:?}, this model needs {:?}", t.dims(), shape.dims())));
                }
                Some(_) => known.insert(name),
            };
        }
    }
    if let Some(name) = file.tensors.keys().find(|name| !known.contains(*name)) {
        return Err(other(format!("there is no layer for {name}")));
    }
    if targets.is_empty() {
        return Err(other("it has no tensors".into()));
    }
    match purpose {
        Use::Training => {
            let arena = arena_for(model, &targets, file.config.r, carried.and(file.config.modules_to_save))?;
            tables::train_tables(model, &arena)?;
            for name in targets.iter().flat_map(Target::names) {
                if let Some((param, tensor)) = arena.param(&name).zip(file.tensors.get(&name)) {
                    param.set(tensor)?;
                }
            }
            put(model, &targets, &file.config, |name| arena.param(name).map(Weight::Trainable))?;
            Ok(Some(arena))
        }
        Use::Inference => {
            let on = model.device();
            let dtype = device::trained_dtype(&on, model.dtype());
            let mut frozen = std::collections::HashMap::new();
            for (name, tensor) in file.tensors.iter().filter(|(name, _)| !carried.tensors().any(|table| table == *name))
            {
                frozen.insert(name.clone(), tensor.to_dtype(dtype)?.to_device(&on)?);
            }
            put(model, &targets, &file.config, |name| frozen.get(name).cloned().map(Weight::Frozen))?;
            Ok(None)
        }
    }
}

fn all_layers(spec: &DecoderSpec) -> Result<Vec<Target>> {
    let layers = linear_layers(spec)?.into_iter();
    Ok(layers.map(|(module, [out_features, in_features])| Target { module, in_features, out_features }).collect())
}

fn targets(model: &dyn CausalLMModel, wanted: &TargetModules) -> Result<Vec<Target>> {
    chosen(all_layers(model.spec())?, wanted)
}

/// The parameters that a fresh adapter would have, by the names of its tensors, without a model to put it on.
///
/// # Errors
/// Where the settings are outside their range or name a layer that the model lacks.
pub fn adapter_tensors(spec: &DecoderSpec, config: &LoraConfig) -> Result<Vec<(String, Shape)>> {
    config.validate()?;
    let targets = chosen(all_layers(spec)?, &config.target_modules)?;
    Ok(targets.iter().flat_map(|target| target.names().into_iter().zip(target.shapes(config.r))).collect())
}

fn chosen(layers: Vec<Target>, wanted: &TargetModules) -> Result<Vec<Target>> {
    let modules: Vec<String> = layers.iter().map(|l| l.module.clone()).collect();
    if let TargetModules::Names(names) = wanted {
        let unmatched = |n: &&String| !modules.iter().any(|m| names_module(n, m));
        let unmatched: Vec<String> = names.iter().filter(unmatched).cloned().collect();
        if !unmatched.is_empty() || names.is_empty() {
            let known = last_parts(&modules).into_iter().map(str::to_owned).collect();
            return Err(Error::NoTarget { targets: unmatched, known });
        }
    }
    Ok(layers.into_iter().filter(|l| wanted.matches(&l.module)).collect())
}

fn arena_for(model: &dyn CausalLMModel, targets: &[Target], r: usize, saved: ModulesToSave) -> Result<Arena> {
    // every A before every B: those of one linear group lie below one another, and their gradients are one product
    let side = |which: usize| targets.iter().map(move |t| (t.names()[which].clone(), t.shapes(r)[which].clone()));
    let names = side(0).chain(side(1));
    let dtype = device::trained_dtype(&model.device(), model.dtype());
    let mut params: Vec<_> = names.map(|(name, shape)| (name, shape, dtype)).collect();
    params.extend(tables::slots(model, saved)?);
    Ok(Arena::mixed(&params, &model.device())?)
}

/// Gives the targets their adapters and every other layer none.
fn put(
    model: &mut dyn CausalLMModel,
    targets: &[Target],
    config: &LoraConfig,
    weight: impl Fn(&str) -> Option<Weight>,
) -> Result<()> {
    Ok(model.for_each_linear(&mut |module, member| {
        member.adapter = targets.iter().enumerate().find(|(_, t)| t.module == module).and_then(|(place, target)| {
            let [a, b] = target.names();
            let (a, b) = weight(&a).zip(weight(&b))?;
            Some(Adapter { a, b, scale: config.scale(), dropout: config.lora_dropout as f32, place: place as u64 })
        });
    })?)
}
