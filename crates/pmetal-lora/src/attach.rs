//! From settings or a file to adapters on a model's layers.

use std::collections::{BTreeSet, HashMap};

use candle_core::{Device, Shape, Tensor};
use pmetal_models::{CausalLMModel, DecoderSpec};
use pmetal_ops::{Adapter, Arena, Weight, device, random};

use crate::{
    AdapterFile, LoraConfig, ModulesToSave, Result,
    experts::ExpertLayout,
    tables,
    targets::{Target, chosen, found},
};

/// What a loaded adapter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Its tensors go to an arena.
    Training,
    /// Its tensors are frozen, and there is no dropout.
    Inference,
}

/// Takes every adapter off a model.
pub fn detach(model: &mut dyn CausalLMModel) -> Result<()> {
    Ok(model.for_each_linear(&mut |_, member| member.adapter = None)?)
}

/// Gives every target layer a fresh adapter: A uniform in `±1 / sqrt(in)` as PEFT's Kaiming start, B zero. Returns their arena, in which
/// are also the tables that are trained in full.
///
/// Experts whose matrices PEFT takes for their transposes start as its: B at random in `±1 / sqrt(out)`, A zero.
pub fn attach(model: &mut dyn CausalLMModel, config: &LoraConfig, seed: u64) -> Result<Arena> {
    config.validate()?;
    let targets = chosen(model.spec(), config)?;
    let arena = arena_for(model, &targets, config.modules_to_save)?;
    tables::train_tables(model, &arena)?;
    let experts = ExpertLayout::of(model.spec());
    for (place, target) in targets.iter().enumerate() {
        let seed = random::mix(seed, &[place as u64]);
        let (side, bound) = target.start(experts.as_ref());
        let shape = &target.shapes()[side];
        let start: Vec<f32> =
            (0..shape.elem_count() as u64).map(|i| (random::uniform(seed, i) * 2.0 - 1.0) * bound).collect();
        if let Some(param) = arena.param(&target.layer.names()[side]) {
            param.set(&Tensor::from_vec(start, shape.clone(), &Device::Cpu)?)?;
        }
    }
    put(model, &targets, config, |name| arena.param(name).map(Weight::Trainable))?;
    Ok(arena)
}

/// Puts an adapter from disk on a model in the place of one that was there, and the tables it carries in place of the model's. For training, its tensors go to the arena
/// that is returned; the tables are trained on, and those its settings name that it does not carry start as the model's.
pub fn attach_file(model: &mut dyn CausalLMModel, file: &AdapterFile, purpose: Use) -> Result<Option<Arena>> {
    let other = |reason: String| file.other_model(reason);
    let tensors = file.for_model(model.spec())?;
    let rank = |[a, b]: &[String; 2]| {
        let rank = |name: &str, side: usize| tensors.get(name).map(|t| t.dims().get(side).copied().unwrap_or(0));
        rank(a, 0).or(rank(b, 1))
    };
    let targets = found(model.spec(), &file.config, rank)?;
    let carried = tables::put_tables(model, file, other)?;
    let mut known: BTreeSet<String> = carried.tensors().map(str::to_owned).collect();
    for target in &targets {
        for (name, shape) in target.layer.names().into_iter().zip(target.shapes()) {
            match tensors.get(&name) {
                None => return Err(other(format!("{name} is missing"))),
                Some(t) if t.shape() != &shape => {
                    return Err(other(format!("{name} is {:?}, this model needs {:?}", t.dims(), shape.dims())));
                }
                Some(_) => known.insert(name),
            };
        }
    }
    if let Some(name) = tensors.keys().find(|name| !known.contains(*name)) {
        return Err(other(format!("there is no layer for {name}")));
    }
    if targets.is_empty() {
        return Err(other("it has no tensors".into()));
    }
    match purpose {
        Use::Training => {
            let arena = arena_for(model, &targets, carried.and(file.config.modules_to_save))?;
            tables::train_tables(model, &arena)?;
            for name in targets.iter().flat_map(|target| target.layer.names()) {
                if let Some((param, tensor)) = arena.param(&name).zip(tensors.get(&name)) {
                    param.set(tensor)?;
                }
            }
            put(model, &targets, &file.config, |name| arena.param(name).map(Weight::Trainable))?;
            Ok(Some(arena))
        }
        Use::Inference => {
            let on = model.device();
            let dtype = device::trained_dtype(&on, model.dtype());
            let mut frozen = HashMap::new();
            for (name, tensor) in tensors.iter().filter(|(name, _)| !carried.tensors().any(|table| table == *name)) {
                frozen.insert(name.clone(), tensor.to_dtype(dtype)?.to_device(&on)?);
            }
            put(model, &targets, &file.config, |name| frozen.get(name).cloned().map(Weight::Frozen))?;
            Ok(None)
        }
    }
}

/// The parameters that a fresh adapter would have, by the names of its tensors, without a model to put it on.
///
/// # Errors
/// Where the settings are outside their range or name a layer that the model lacks.
pub fn adapter_tensors(spec: &DecoderSpec, config: &LoraConfig) -> Result<Vec<(String, Shape)>> {
    config.validate()?;
    let targets = chosen(spec, config)?;
    Ok(targets.iter().flat_map(|target| target.layer.names().into_iter().zip(target.shapes())).collect())
}

fn arena_for(model: &dyn CausalLMModel, targets: &[Target], saved: ModulesToSave) -> Result<Arena> {
    // every A before every B: those of one linear group lie below one another, and their gradients are one product
    let side = |which: usize| targets.iter().map(move |t| (t.layer.names()[which].clone(), t.shapes()[which].clone()));
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
    let places: HashMap<&str, usize> = targets.iter().map(|t| t.layer.module.as_str()).zip(0..).collect();
    Ok(model.for_each_linear(&mut |module, member| {
        member.adapter = places.get(module).and_then(|&place| {
            let [a, b] = targets[place].layer.names();
            let (a, b) = weight(&a).zip(weight(&b))?;
            let dropout = config.lora_dropout as f32;
            Some(Adapter { a, b, scale: targets[place].scale, dropout, place: place as u64 })
        });
    })?)
}
