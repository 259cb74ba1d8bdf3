//! What a step needs of memory beside weights and optimizer, and which results survive its forward pass within a limit.

use pmetal_models::{Checkpointing, DecoderSpec};
use pmetal_ops::{DeviceRates, Fate, LOGITS_BYTES as MOST_LOGITS_BYTES, Policy, Saved};

use crate::columns::Columns;

/// The results that can be computed again.
const COMPUTED: [Saved; 4] = [Saved::Middle, Saved::Attention, Saved::Projections, Saved::Gates];
/// Bytes of logits at a time: no fewer, so that products stay large; no more.
const LOGITS_BYTES: [u64; 2] = [MOST_LOGITS_BYTES as u64 / 2, MOST_LOGITS_BYTES as u64];
/// Bytes of what is small: ids, statistics, partial sums. Estimates are a hundredth larger besides.
const SMALL_BYTES: u64 = 16 << 20;
/// More bytes than any machine has: a thousand layers of it can be added up.
const ANY_MACHINE: u64 = 1 << 50;
/// A device's rate of products where nothing was measured: only ratios of times count then.
const NOMINAL: f64 = 1e12;
/// Attention's rate as a share of that of large products.
const ATTENTION: f64 = 0.6;
/// Floating-point operations of products in the time that takes a byte of memory.
const OPERATIONS_PER_BYTE: f64 = 200.0;
/// The share of the forward pass that copies to the host may take.
const COPYING: f64 = 0.8;
/// What a copy to the host costs of its time, though it goes beside the computing.
const COPY_COST: f64 = 0.03;

/// A decoder and the tokens of a step's largest micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct StepSize<'a> {
    /// The decoder.
    pub spec: &'a DecoderSpec,
    /// Bytes of an activation.
    pub width: u64,
    /// Of the adapter; 0 without one.
    pub rank: u64,
    /// Tokens that go through the model together.
    pub tokens: u64,
    /// Of the longest row.
    pub longest: u64,
}

/// Which layers run again, and how much of the logits exists at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryChoice {
    /// None where no layer runs again.
    pub checkpointing: Option<Checkpointing>,
    /// Bytes of logits at a time.
    pub logits_bytes: u64,
    /// Bytes that the step takes at most, beside weights and optimizer.
    pub bytes: u64,
    /// The same, were there no logits.
    pub bytes_without_logits: u64,
    /// Bytes that rest in the host's memory.
    pub host_bytes: u64,
    /// Whether that is within the limit.
    pub fits: bool,
}

impl StepSize<'_> {
    fn layers(&self) -> usize {
        self.spec.num_hidden_layers()
    }

    /// What each layer computes.
    fn columns(&self) -> impl Iterator<Item = Columns> {
        self.spec.layers.iter().map(|layer| Columns::of(layer, self.spec.hidden_size))
    }

    /// What each layer computes, and what becomes of it; none where the layer does not run again.
    fn policies(&self, checkpointing: Option<Checkpointing>) -> impl Iterator<Item = (Columns, Option<Policy>)> {
        self.columns().enumerate().map(move |(i, layer)| {
            let policy = checkpointing.and_then(|checkpointing| checkpointing.policy(i, self.layers()));
            let whole = |policy: Policy| {
                if layer.has_middle { policy } else { policy.with(Saved::Middle, Fate::Recompute) }
            };
            (layer, policy.map(whole))
        })
    }

    /// Bytes of `elements` for each token.
    fn bytes(&self, elements: u64) -> u64 {
        self.tokens.saturating_mul(self.width).saturating_mul(elements).min(ANY_MACHINE)
    }

    /// Bytes of a result in a layer.
    fn bytes_of(&self, layer: &Columns, saved: Saved) -> u64 {
        match saved {
            Saved::Middle if !layer.has_middle => 0,
            Saved::Input | Saved::Middle => self.bytes(layer.hidden),
            Saved::Projections => self.bytes(layer.attention.projections),
            Saved::Attention => self.bytes(layer.attention.q + self.rank) + 4 * self.tokens * layer.attention.heads,
            Saved::Gates => self.bytes(layer.mlp.gates),
        }
    }

    /// Seconds of so many multiplications for each token.
    fn seconds(&self, elements: u64, product: f64) -> f64 {
        2.0 * self.tokens as f64 * elements as f64 / product
    }

    /// Seconds that computing a result again takes.
    fn seconds_of(&self, layer: &Columns, saved: Saved, product: f64) -> f64 {
        let times = |elements| self.seconds(elements, product);
        match saved {
            Saved::Input => 0.0,
            Saved::Middle if !layer.has_middle => 0.0,
            Saved::Middle => times(layer.hidden * layer.attention.output),
            Saved::Projections => times(layer.hidden * layer.attention.projections),
            Saved::Attention => times(layer.attention.q * self.longest) / ATTENTION,
            Saved::Gates => times(layer.hidden * layer.mlp.gates),
        }
    }

    /// Seconds of a layer's forward.
    fn forward_seconds(&self, layer: &Columns, product: f64) -> f64 {
        let saved: f64 = Saved::ALL.iter().map(|&saved| self.seconds_of(layer, saved, product)).sum();
        saved + self.seconds(layer.hidden * layer.mlp.product, product) + self.passes(layer, product)
    }

    /// Seconds of what is in no choice: norms, rope, the gate, experts, products between the short rows of attention and its heads.
    fn passes(&self, layer: &Columns, product: f64) -> f64 {
        let Columns { attention, mlp, .. } = layer;
        let moved = 5 * layer.hidden + 2 * (attention.q + attention.k) + mlp.gates + mlp.product + mlp.experts;
        self.bytes(moved) as f64 * OPERATIONS_PER_BYTE / product + self.seconds(attention.again + mlp.again, product)
    }

    /// Bytes of the MLP's results in a layer that does not run again: gate, up and their product, rows of experts.
    fn whole_mlp(&self, layer: &Columns) -> u64 {
        self.bytes(layer.mlp.gates + layer.mlp.product + layer.mlp.experts)
    }

    /// Bytes that a layer that does not run again keeps: sums and norms, q, k and v (before and behind their norms), the heads' results, the MLP's
    /// results; f32 statistics and low-rank products.
    fn whole_layer(&self, layer: &Columns) -> u64 {
        let attention = &layer.attention;
        let attended = attention.projections + attention.between_stays + attention.q;
        self.bytes(layer.streams + 2 * layer.behind + attended + layer.linears * self.rank)
            + self.whole_mlp(layer)
            + 4 * self.tokens * (layer.statistics + self.picked(layer))
    }

    /// Keys that a query picks, where it does not see all.
    fn picked(&self, layer: &Columns) -> u64 {
        layer.attention.picks.filter(|&picks| picks < self.longest).unwrap_or(0)
    }

    /// Bytes of the scores by which a row's queries pick their keys: the sum, a head's, and one more while they meet.
    fn picking(&self, layer: &Columns) -> u64 {
        if self.picked(layer) > 0 { 3 * 4 * self.longest * self.longest } else { 0 }
    }

    /// Bytes that a layer leaves on the device; those it leaves with the host.
    fn left(&self, layer: &Columns, policy: Option<Policy>) -> (u64, u64) {
        let Some(policy) = policy else { return (self.whole_layer(layer), 0) };
        let bytes = |saved| self.bytes_of(layer, saved);
        let of = |fate| Saved::ALL.into_iter().filter(|&s| policy.fate(s) == fate).map(bytes).sum::<u64>();
        let input = if policy.fate(Saved::Input) == Fate::Recompute { bytes(Saved::Input) } else { 0 };
        (of(Fate::Keep) + input, of(Fate::Host))
    }

    /// Bytes of a layer's second run and its backward, beside what it left on the device.
    fn room(&self, layer: &Columns, policy: Option<Policy>) -> u64 {
        let &Columns { hidden, behind, attention, mlp, .. } = layer;
        let gradients = mlp.gates + mlp.product + mlp.experts + 4 * hidden;
        let of_attention = 4 * attention.q + 3 * attention.k + 3 * hidden;
        let Some(policy) = policy else {
            let later = self.bytes(of_attention).saturating_sub(self.whole_mlp(layer));
            return self.bytes(gradients).max(later).max(self.picking(layer));
        };
        let computed = |saved| if policy.fate(saved) == Fate::Keep { 0 } else { self.bytes_of(layer, saved) };
        let mlp = self.bytes(gradients + mlp.experts + hidden + behind) + computed(Saved::Gates);
        let attended = computed(Saved::Projections)
            + computed(Saved::Attention)
            + self.bytes(attention.between + 2 * hidden + behind)
            + 4 * self.tokens * self.picked(layer);
        if policy.fate(Saved::Middle) == Fate::Recompute {
            return (mlp + attended).max(attended + self.picking(layer));
        }
        mlp.max(attended + self.bytes(of_attention).max(self.picking(layer)))
    }

    /// Bytes that a step takes at most; those that rest with the host.
    fn peak(&self, checkpointing: Option<Checkpointing>, logits_bytes: u64) -> (u64, u64) {
        let mut left = 0;
        let (mut most, mut host) = (0, 0);
        let mut before = 0;
        for (layer, policy) in self.policies(checkpointing) {
            let (here, away) = self.left(&layer, policy);
            left += here;
            // what the part before left with the host comes back meanwhile: the layer before, or the same layer's attention
            let halves = policy.is_some_and(|policy| policy.fate(Saved::Middle) != Fate::Recompute);
            let away_here = if halves { away.max(before) } else { away + before };
            most = most.max(left + away_here + self.room(&layer, policy));
            (host, before) = (host + away, away);
        }
        let most = most.max(self.loss(checkpointing) + logits_bytes);
        (most + most / 100 + SMALL_BYTES, host)
    }

    /// Bytes that are there when the loss is computed, beside logits.
    fn loss(&self, checkpointing: Option<Checkpointing>) -> u64 {
        let left = self.policies(checkpointing).map(|(layer, policy)| self.left(&layer, policy).0);
        left.sum::<u64>() + self.bytes(3 * self.spec.hidden_size as u64)
    }

    /// Seconds that a step takes longer than without checkpointing.
    fn cost(&self, checkpointing: Checkpointing, rates: &DeviceRates) -> f64 {
        let of_layer = |(layer, policy): (Columns, Option<Policy>)| {
            let Some(policy) = policy else { return 0.0 };
            let again = Saved::ALL.iter().filter(|&&saved| policy.fate(saved) == Fate::Recompute);
            let again: f64 = again.map(|&saved| self.seconds_of(&layer, saved, rates.product)).sum();
            let away = self.left(&layer, Some(policy)).1;
            again + self.passes(&layer, rates.product) + COPY_COST * away as f64 / rates.host
        };
        self.policies(Some(checkpointing)).map(of_layer).sum()
    }

    /// What to run again so that a step takes at most `limit` bytes and the least time; without a limit, and where layers are to run again by all
    /// means, what takes the least memory without making the device wait for the host.
    pub fn choose(&self, limit: Option<u64>, again: bool, rates: Option<DeviceRates>) -> MemoryChoice {
        if !again && limit.is_none_or(|limit| self.peak(None, LOGITS_BYTES[0]).0 <= limit) {
            return self.choice(None, limit);
        }
        let host = rates.is_some();
        let rates = rates.unwrap_or(DeviceRates { product: NOMINAL, host: f64::INFINITY });
        let mut candidates = self.candidates(host, &rates);
        if let Some(limit) = limit {
            for candidate in &mut candidates {
                self.fill(candidate, limit, &rates);
            }
            let fitting = candidates.iter().copied().filter(|&c| self.peak(Some(c), LOGITS_BYTES[0]).0 <= limit);
            let best = fitting.min_by(|&a, &b| self.cost(a, &rates).total_cmp(&self.cost(b, &rates)));
            if best.is_some() {
                return self.choice(best, Some(limit));
            }
        }
        // of those that take hardly more than the least, the fastest
        let bytes = |c| self.peak(Some(c), LOGITS_BYTES[0]).0;
        let least = candidates.iter().map(|&c| bytes(c)).min().unwrap_or(0);
        let small =
            candidates.into_iter().filter(|&c| limit.is_none() && bytes(c) <= least + least / 10 || bytes(c) == least);
        self.choice(small.min_by(|&a, &b| self.cost(a, &rates).total_cmp(&self.cost(b, &rates))), limit)
    }

    /// Nothing at rest with the host; inputs, and every choice of results that copies to the host can keep up with.
    fn candidates(&self, host: bool, rates: &DeviceRates) -> Vec<Checkpointing> {
        let mut candidates = vec![Checkpointing::INPUTS];
        if !host || self.layers() < 2 {
            return candidates;
        }
        let seconds: f64 = self.columns().map(|layer| self.forward_seconds(&layer, rates.product)).sum();
        let bytes_in_time = COPYING * rates.host * seconds;
        for choice in 0..1u32 << COMPUTED.len() {
            let chosen = COMPUTED.iter().enumerate().filter(|(i, _)| choice >> i & 1 == 1).map(|(_, &saved)| saved);
            let mut candidate = Checkpointing::INPUTS;
            let mut bytes = 0;
            for saved in chosen.chain([Saved::Input]) {
                bytes += self.columns().map(|layer| self.bytes_of(&layer, saved)).sum::<u64>();
                candidate.policy = candidate.policy.with(saved, Fate::Host);
                // the last layer is the first to run again: what would leave would come back at once
                candidate.kept[saved as usize] = 1;
            }
            if bytes as f64 <= bytes_in_time {
                candidates.push(candidate);
            }
        }
        candidates
    }

    /// Results that can be computed again, those first that save the most time for their bytes.
    fn by_worth(&self, rates: &DeviceRates) -> Vec<Saved> {
        let worth = |&saved: &Saved| {
            let seconds: f64 = self.columns().map(|layer| self.seconds_of(&layer, saved, rates.product)).sum();
            let bytes: u64 = self.columns().map(|layer| self.bytes_of(&layer, saved)).sum();
            seconds / bytes.max(1) as f64
        };
        let mut order = COMPUTED.to_vec();
        order.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
        order
    }

    /// Keeps on the device what still fits, in as many of the last layers as it fits.
    fn fill(&self, candidate: &mut Checkpointing, limit: u64, rates: &DeviceRates) {
        let fits = |candidate: &Checkpointing| self.peak(Some(*candidate), LOGITS_BYTES[0]).0 <= limit;
        let computed = self.by_worth(rates).into_iter().filter(|&s| candidate.policy.fate(s) == Fate::Recompute);
        for saved in computed.collect::<Vec<_>>() {
            let with = |layers| {
                let mut with = *candidate;
                with.kept[saved as usize] = layers;
                with
            };
            let found = (1..=self.layers()).rev().map(with).find(|with| fits(with));
            *candidate = found.unwrap_or(*candidate);
        }
        let with = |whole| {
            let mut with = *candidate;
            with.whole = whole;
            with
        };
        let whole = (1..=self.layers()).rev().map(with).find(|with| fits(with));
        *candidate = whole.unwrap_or(*candidate);
    }

    fn choice(&self, checkpointing: Option<Checkpointing>, limit: Option<u64>) -> MemoryChoice {
        let (bytes, host_bytes) = self.peak(checkpointing, LOGITS_BYTES[0]);
        let most = match (limit, checkpointing) {
            (Some(limit), _) => limit,
            (None, None) => u64::MAX,
            // a larger block is free as long as the layers need as much
            (None, Some(_)) => bytes,
        };
        let [least, enough] = LOGITS_BYTES;
        let most = most.saturating_sub(SMALL_BYTES) / 101 * 100;
        let logits_bytes = most.saturating_sub(self.loss(checkpointing)).clamp(least, enough);
        let (bytes, _) = self.peak(checkpointing, logits_bytes);
        MemoryChoice {
            checkpointing,
            logits_bytes,
            bytes,
            bytes_without_logits: self.peak(checkpointing, 0).0,
            host_bytes,
            fits: limit.is_none_or(|limit| bytes <= limit),
        }
    }
}

impl MemoryChoice {
    /// What was chosen, in one line; none where no layer runs again. `fixed` bytes are weights and optimizer.
    pub fn line(&self, layers: usize, fixed: u64) -> Option<String> {
        let checkpointing = self.checkpointing?;
        let policies: Vec<Policy> = (0..layers).filter_map(|i| checkpointing.policy(i, layers)).collect();
        let named = |fate| {
            let found = Saved::ALL.into_iter().filter_map(|saved| {
                let count = policies.iter().filter(|policy| policy.fate(saved) == fate).count();
                let here = if count == layers { String::new() } else { format!(" in {count}") };
                (count > 0 && (saved != Saved::Input || fate == Fate::Host)).then(|| format!("{}{here}", name(saved)))
            });
            let found: Vec<String> = found.collect();
            if found.is_empty() { "nothing".into() } else { found.join(", ") }
        };
        let host = match self.host_bytes {
            0 => String::new(),
            bytes => format!("; at rest with the host ({}): {}", gib(bytes), named(Fate::Host)),
        };
        Some(format!(
            "{} of {layers} layers run again in backward; computed again: {}{host}; about {} in all",
            policies.len(),
            named(Fate::Recompute),
            gib(fixed + self.bytes)
        ))
    }
}

fn name(saved: Saved) -> &'static str {
    match saved {
        Saved::Input => "inputs",
        Saved::Middle => "the stream before the MLP",
        Saved::Projections => "q, k and v",
        Saved::Attention => "attention",
        Saved::Gates => "gate and up",
    }
}

pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Bytes from `17.8GiB`, `16 GB`, `512MiB` or a plain number.
///
/// # Errors
/// Where that is none of these.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let number_end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let unit = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" | "g" => 1_073_741_824.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(format!("{unit} is no unit: use GiB, MiB, GB, MB or none for bytes")),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok((number * unit) as u64),
        _ => Err("expected a number of bytes, as in 17.8GiB".into()),
    }
}
