/// What becomes of a result between the two runs of a checkpointed function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// It is dropped, and computed again.
    #[default]
    Recompute,
    /// It stays on the device.
    Keep,
    /// It rests in the host's memory, where the device has a memory of its own; else it stays.
    Host,
}

/// The results of a decoder's layer that a policy decides on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved {
    /// What a checkpointed function reads; it is never computed again.
    Input,
    /// The residual stream between attention and MLP. Where it survives, each of the two is a checkpointed function of its own, and the product
    /// that ends attention is not computed again.
    Middle,
    /// q, k and v, before norms and rope.
    Projections,
    /// Attention's result and its log-sum-exp.
    Attention,
    /// gate and up.
    Gates,
}

impl Saved {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Input, Self::Middle, Self::Projections, Self::Attention, Self::Gates];
}

/// Which results survive the first run of a checkpointed function, and where; by default nothing but its inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    fates: [Fate; Saved::ALL.len()],
}

impl Policy {
    /// Nothing survives but inputs.
    pub const INPUTS: Self = Self { fates: [Fate::Recompute; Saved::ALL.len()] };

    /// The policy with another fate for `saved`.
    pub const fn with(mut self, saved: Saved, fate: Fate) -> Self {
        self.fates[saved as usize] = fate;
        self
    }

    /// What becomes of `saved`.
    pub const fn fate(&self, saved: Saved) -> Fate {
        self.fates[saved as usize]
    }
}
