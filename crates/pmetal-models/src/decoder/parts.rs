//! What layers are built of: weights and linear layers that know their names.

use candle_core::{Shape, Tensor};
use pmetal_ops::{LinearGroup, LinearMember, Value, Weight};

use crate::{
    Result,
    names::{LAYERS, Names},
};

/// Where the weights of a layer come from.
pub(super) struct Parts<'a> {
    get: &'a mut dyn FnMut(&str, Shape) -> Result<Weight>,
    names: &'a Names,
    layer: usize,
}

/// A weight and its name.
#[derive(Clone)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) weight: Weight,
}

/// A linear layer: its module's part name, its widths, whether it has a bias.
pub(super) struct LinearShape<'a> {
    pub(super) part: &'a str,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) bias: bool,
}

/// Linear layers that read the same input, and their modules' names.
#[derive(Clone)]
pub(super) struct Linears {
    group: LinearGroup,
    modules: Vec<String>,
}

impl<'a> Parts<'a> {
    /// The parts of layer `layer`, of the weights that `get` returns by name and shape.
    pub(super) fn new(names: &'a Names, layer: usize, get: &'a mut dyn FnMut(&str, Shape) -> Result<Weight>) -> Self {
        Self { get, names, layer }
    }

    /// The name of a part.
    pub(super) fn name(&self, part: &str) -> String {
        format!("{LAYERS}{}.{}", self.layer, self.names.of(part))
    }

    /// The weight of a part.
    pub(super) fn weight(&mut self, part: &str, shape: impl Into<Shape>) -> Result<Named> {
        let name = self.name(part);
        Ok(Named { weight: (self.get)(&name, shape.into())?, name })
    }

    /// Linear layers that read the same input.
    pub(super) fn linears(&mut self, shapes: &[LinearShape]) -> Result<Linears> {
        let (mut members, mut modules) = (Vec::with_capacity(shapes.len()), Vec::with_capacity(shapes.len()));
        for &LinearShape { part, inputs, outputs, bias } in shapes {
            let module = self.name(part);
            let weight = (self.get)(&format!("{module}.weight"), (outputs, inputs).into())?.packed()?;
            let bias = bias.then(|| (self.get)(&format!("{module}.bias"), outputs.into())).transpose()?;
            members.push(LinearMember { weight, bias, adapter: None });
            modules.push(module);
        }
        Ok(Linears { group: LinearGroup::new(members)?, modules })
    }
}

impl Linears {
    /// One layer's group, and its modules' names.
    pub(super) fn into_parts(self) -> (LinearGroup, Vec<String>) {
        (self.group, self.modules)
    }

    /// The weight of layer `place` with what its adapter adds, as a tensor of the weight's dtype.
    pub(super) fn merged(&self, place: usize) -> Result<Tensor> {
        Ok(self.group.merged(place)?)
    }

    /// The layers without their names.
    pub(super) fn group(&self) -> &LinearGroup {
        &self.group
    }

    /// See [`LinearGroup::spare_columns`].
    pub(super) fn spare_columns(&self) -> usize {
        self.group.spare_columns()
    }

    /// Projects `x [tokens, inputs]` to `[tokens, outputs]` for each layer.
    pub(super) fn forward(&self, x: &Value, noise: Option<u64>) -> Result<Vec<Value>> {
        Ok(self.group.forward(x, noise)?)
    }

    /// Visits the layers under their modules' names, to change them.
    pub(super) fn for_each(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        let modules = &self.modules;
        Ok(self
            .group
            .change(|members| members.iter_mut().zip(modules).for_each(|(member, module)| f(module, member)))?)
    }

    /// Every weight with its name.
    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        for (module, member) in self.modules.iter().zip(self.group.members()) {
            to.push((format!("{module}.weight"), member.weight.clone()));
            to.extend(member.bias.iter().map(|bias| (format!("{module}.bias"), bias.clone())));
        }
    }
}

impl Named {
    /// It and its name.
    pub(super) fn pair(&self) -> (String, Weight) {
        (self.name.clone(), self.weight.clone())
    }
}

/// `N` results.
pub(super) fn take<T, const N: usize>(values: Vec<T>) -> Result<[T; N]> {
    let found = values.len();
    let wrong = |_| crate::Error::Input { reason: format!("{found} results where there are {N}") };
    values.try_into().map_err(wrong)
}
