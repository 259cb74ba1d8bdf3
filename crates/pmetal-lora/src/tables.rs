//! The embedding and the head beside an adapter: PEFT's `modules_to_save`, trained in full and saved whole.

use std::str::FromStr;

use candle_core::{DType, Shape, Tensor};
use pmetal_models::{CausalLMModel, EMBEDDING, HEAD, resize_table};
use pmetal_ops::{Arena, Weight};
use serde::{Deserialize, Serialize};

use crate::{AdapterFile, Error, Result};

/// Which of a model's two tables are trained in full beside the adapter, and saved with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModulesToSave {
    /// The embedding; where the head is the embedding, both.
    pub embed_tokens: bool,
    /// The head.
    pub lm_head: bool,
}

impl ModulesToSave {
    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Those of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { embed_tokens: self.embed_tokens || other.embed_tokens, lm_head: self.lm_head || other.lm_head }
    }

    /// Adds a module by its name, of which the last part counts; false where it is no table.
    pub(crate) fn add(&mut self, module: &str) -> bool {
        match module.rsplit('.').next() {
            Some("embed_tokens") => self.embed_tokens = true,
            Some("lm_head") => self.lm_head = true,
            _ => return false,
        }
        true
    }

    /// The modules' names.
    pub fn names(self) -> Vec<&'static str> {
        let named = [(self.embed_tokens, "embed_tokens"), (self.lm_head, "lm_head")];
        named.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect()
    }

    /// The tensors of the modules.
    pub(crate) fn tensors(self) -> impl Iterator<Item = &'static str> {
        let named = [(self.embed_tokens, EMBEDDING), (self.lm_head, HEAD)];
        named.into_iter().filter(|(is, _)| *is).map(|(_, name)| name)
    }
}

impl FromStr for ModulesToSave {
    type Err = Error;

    /// Reads names with commas between.
    fn from_str(list: &str) -> Result<Self> {
        let mut modules = Self::default();
        match list.split(',').map(str::trim).find(|name| !modules.add(name)) {
            Some(name) => Err(Error::UnknownModule { name: name.to_owned() }),
            None => Ok(modules),
        }
    }
}

impl TryFrom<String> for ModulesToSave {
    type Error = Error;

    fn try_from(list: String) -> Result<Self> {
        if list.is_empty() { Ok(Self::default()) } else { list.parse() }
    }
}

impl From<ModulesToSave> for String {
    fn from(modules: ModulesToSave) -> Self {
        modules.names().join(",")
    }
}

impl AdapterFile {
    /// Rows of the tables it carries; none where it leaves the model's as they are.
    pub fn vocab_rows(&self) -> Option<usize> {
        [EMBEDDING, HEAD].into_iter().find_map(|name| self.tensors.get(name)?.dims().first().copied())
    }

    /// Gives the tables it carries `rows` rows; new ones, and those of the ids `fresh`, are the mean of the others.
    pub fn resize_vocabulary(&mut self, rows: usize, fresh: &[u32]) -> Result<()> {
        for name in [EMBEDDING, HEAD] {
            if let Some(table) = self.tensors.get_mut(name) {
                *table = resize_table(table, rows, fresh)?;
            }
        }
        Ok(())
    }
}

/// Puts the tables an adapter carries in place of the model's. Returns which of them it carries.
///
/// PEFT copies what `modules_to_save` names before it trains it: the embedding alone, saved for a model whose head was its embedding,
/// leaves the head as the base has it.
pub(crate) fn put_tables(
    model: &mut dyn CausalLMModel,
    file: &AdapterFile,
    other_model: impl Fn(String) -> Error,
) -> Result<ModulesToSave> {
    let (embedding, head) = (file.tensors.get(EMBEDDING), file.tensors.get(HEAD));
    let carried = ModulesToSave { embed_tokens: embedding.is_some(), lm_head: head.is_some() };
    if carried.is_empty() {
        return Ok(carried);
    }
    let tied = model.spec().tie_word_embeddings;
    let new_embedding = match embedding {
        Some(table) => placed(table, model)?,
        None => model.embedding().clone(),
    };
    let new_head = match (embedding, head) {
        (Some(embedding), Some(head)) if tied && equal(embedding, head)? => None,
        (_, Some(head)) => Some(placed(head, model)?),
        (_, None) if tied && !file.config.modules_to_save.embed_tokens => None,
        (_, None) => Some(model.head().clone()),
    };
    let hidden = model.spec().hidden_size;
    let head_shape = new_head.as_ref().unwrap_or(&new_embedding).shape();
    for (name, shape) in [(EMBEDDING, new_embedding.shape()), (HEAD, head_shape)] {
        if shape.rank() != 2 || shape.dims().last() != Some(&hidden) {
            return Err(other_model(format!("{name} is {:?}, this model needs rows of {hidden}", shape.dims())));
        }
    }
    if new_embedding.shape() != head_shape {
        let (rows, heads) = (new_embedding.shape().dims(), head_shape.dims());
        let reason = format!("{EMBEDDING} is {rows:?}, {HEAD} {heads:?}: save both with the adapter");
        return Err(other_model(reason));
    }
    model.set_tables(new_embedding, new_head)?;
    Ok(carried)
}

/// A table as the model computes with it: halves stay as they are stored, as the model's own do.
fn placed(table: &Tensor, model: &dyn CausalLMModel) -> Result<Weight> {
    let dtype = if table.dtype() == DType::F32 { model.dtype() } else { table.dtype() };
    Ok(Weight::Frozen(table.to_dtype(dtype)?.to_device(&model.device())?))
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    let comparable = a.shape() == b.shape() && a.dtype() == b.dtype() && a.elem_count() > 0;
    Ok(comparable && a.eq(b)?.flatten_all()?.min(0)?.to_scalar::<u8>()? == 1)
}

/// Room for the tables of `modules`: names, shapes, and the dtype the model computes in.
pub(crate) fn slots(model: &dyn CausalLMModel, modules: ModulesToSave) -> Result<Vec<(String, Shape, DType)>> {
    let tied = model.spec().tie_word_embeddings;
    if tied && modules.lm_head && !modules.embed_tokens {
        return Err(Error::TiedHead);
    }
    let shape = model.embedding().shape();
    let names = modules.tensors().filter(|&name| !(tied && name == HEAD));
    Ok(names.map(|name| (name.to_owned(), shape.clone(), model.dtype())).collect())
}

/// Copies the tables that the arena has room for there, and trains them.
pub(crate) fn train_tables(model: &mut dyn CausalLMModel, arena: &Arena) -> Result<()> {
    let trained = |name: &str, table: &Weight| match arena.param(name) {
        None => Ok::<_, Error>(table.clone()),
        Some(param) => {
            param.set(&table.tensor()?)?;
            Ok(Weight::Trainable(param))
        }
    };
    let embedding = trained(EMBEDDING, model.embedding())?;
    let head = if model.spec().tie_word_embeddings { None } else { Some(trained(HEAD, model.head())?) };
    Ok(model.set_tables(embedding, head)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_modules_and_what_is_none() {
        let modules: ModulesToSave = "lm_head, model.embed_tokens".parse().unwrap();
        assert_eq!(modules.names(), ["embed_tokens", "lm_head"]);
        assert_eq!(String::from(modules), "embed_tokens,lm_head");
        let error = "embed_tokens,norm".parse::<ModulesToSave>().unwrap_err().to_string();
        assert!(error.contains("norm") && error.contains("embed_tokens, lm_head"), "{error}");
    }
}
