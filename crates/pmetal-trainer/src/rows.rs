//! The rows of a run: read, held back for evaluation, put into batches.

use std::{
    ops::ControlFlow,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use pmetal_data::{Dataset, Examples, Mix, Packing, Report, Sampler, Split, Template, Tokenizer, Watch, pack};
use pmetal_hub::DownloadProgress;

use crate::{Epochs, Error, Observer, Result, SftOptions, data_options::find};

/// The rows of a run, tokenized.
pub(crate) struct Rows {
    /// To train on.
    pub(crate) train: Examples,
    /// To evaluate on; there may be none.
    pub(crate) eval: Examples,
    /// What became of the files to train on.
    pub(crate) report: Report,
}

impl Rows {
    /// Reads the datasets that `options` name, for a model of `vocab_size` ids. Rows to evaluate on are `--eval-dataset`, a share held back,
    /// or the `valid` files of a dataset that is a folder.
    pub(crate) fn read(
        options: &SftOptions,
        vocab_size: usize,
        tokenizer: Option<&Tokenizer>,
        template: &Template,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let dataset_options = options.data.dataset_options(template.clone(), vocab_size);
        let mix = options.data.mix(options.seed, observer.downloads())?;
        let eval = eval_mix(options, &mix, observer.downloads())?;
        let mut watch = Reading { observer, stop };
        let Dataset { examples, report } = Dataset::load(&mix, tokenizer, &dataset_options, &mut watch)?;
        if let Some(share) = options.eval_split {
            let (train, eval) = hold_back(&examples, share, options.seed)?;
            return Ok(Self { train, eval, report });
        }
        let eval = match eval {
            Some(mix) => Dataset::load(&mix, tokenizer, &dataset_options, &mut watch)?.examples,
            None => Examples::default(),
        };
        Ok(Self { train: examples, eval, report })
    }
}

/// The files to evaluate on.
fn eval_mix(options: &SftOptions, train: &Mix, progress: &dyn DownloadProgress) -> Result<Option<Mix>> {
    let Some(path) = &options.eval_dataset else {
        let parts: Vec<_> = train.parts.iter().filter(|(source, _)| source.has(Split::Valid)).cloned().collect();
        let parts: Vec<_> = parts.into_iter().map(|(source, _)| (source, 1.0)).collect();
        return Ok((!parts.is_empty()).then_some(Mix { parts, split: Split::Valid, seed: 0 }));
    };
    let source = find(path, progress)?;
    let split = [Split::Valid, Split::Test].into_iter().find(|&split| source.has(split)).unwrap_or(Split::Train);
    Ok(Some(Mix { split, ..source.into() }))
}

/// Holds back a share of the rows (below 1) or a number of them (whole).
fn hold_back(rows: &Examples, share: f64, seed: u64) -> Result<(Examples, Examples)> {
    let n = rows.len();
    if share > 1.0 && share.fract() != 0.0 {
        let reason = format!("{share} is neither a share of the rows, such as 0.1, nor a whole number of them");
        return Err(Error::Option { option: "--eval-split", reason });
    }
    let held = if share < 1.0 { (share * n as f64).round() } else { share };
    if !(held >= 1.0 && held < n as f64) {
        let reason = format!("{share} of {n} rows leaves nothing to train on or to evaluate on");
        return Err(Error::Option { option: "--eval-split", reason });
    }
    Ok(rows.split(held as usize, seed))
}

/// Passes on what reading reports, and stops it.
struct Reading<'a> {
    observer: &'a mut dyn Observer,
    stop: &'a AtomicBool,
}

impl Watch for Reading<'_> {
    fn reading(&mut self, file: &Path, read: u64, total: u64, rows: usize) -> ControlFlow<()> {
        self.observer.reading(file, read, total, rows);
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// The micro-batches of each epoch: of rows, or of packs of rows.
pub(crate) struct Batches {
    /// Of rows, or of packs as if they were rows.
    pub(crate) sampler: Sampler,
    /// The packs, where there are any.
    pub(crate) packing: Option<Packing>,
}

impl Batches {
    pub(crate) fn new(options: &SftOptions, rows: &Examples) -> Result<Self> {
        let mut lengths = rows.lengths()?;
        let mut packing = None;
        if options.use_sequence_packing {
            let packed = pack(&lengths, options.data.max_seq_len);
            let tokens = |pack: usize| packed.pack(pack).iter().filter_map(|&row| lengths.get(row as usize)).sum();
            lengths = (0..packed.len()).map(tokens).collect();
            packing = Some(packed);
        }
        Ok(Self { sampler: Sampler::new(lengths, options.batch_size, options.seed, !options.no_shuffle), packing })
    }
}

impl Epochs for Batches {
    fn batches(&self) -> usize {
        self.sampler.batches()
    }

    fn epoch(&self, epoch: usize) -> Box<dyn Iterator<Item = Vec<usize>> + '_> {
        let batches = self.sampler.epoch(epoch);
        let Some(packing) = &self.packing else { return batches };
        let rows = |pack: usize| packing.pack(pack).iter().map(|&row| row as usize);
        Box::new(batches.map(move |packs| packs.into_iter().flat_map(rows).collect()))
    }
}
