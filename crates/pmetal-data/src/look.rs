//! Rows one at a time, to be looked at or written in another format.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::{
    columns::ColumnMap,
    dataset::{DatasetOptions, Mix, Watch},
    encode::RowEncoder,
    error::{Error, Place, Result, RowFault},
    reader::{for_each_row, size_of},
    row::{Format, Row},
    template::Template,
    tokenizer::Tokenizer,
    view::TokenView,
    writer::RowsFile,
};

/// Rows between two words to whoever watches.
const OFTEN: usize = 1000;

/// A row as the model will see it.
#[derive(Debug, Clone, PartialEq)]
pub struct RowView {
    /// The file it is in.
    pub file: PathBuf,
    /// Where it stands there.
    pub place: Place,
    /// Its tokens, before any cut.
    pub tokens: Vec<TokenView>,
}

/// Shows rows token by token, in order, until `show` breaks.
///
/// # Errors
/// When a file cannot be read, at the first broken row, or what `show` returns.
pub fn preview<E: From<Error>>(
    mix: &Mix,
    tokenizer: Option<&Tokenizer>,
    options: &DatasetOptions,
    mut show: impl FnMut(RowView) -> Result<ControlFlow<()>, E>,
) -> Result<(), E> {
    let encoder = RowEncoder::new(tokenizer, &options.template, options.train_on);
    let mut failed = None;
    rows(mix, &options.columns, &mut (), &mut |file, place, row| {
        let tokens = encoder.view(&row)?;
        let shown = show(RowView { file: file.to_path_buf(), place, tokens });
        Ok(shown.unwrap_or_else(|error| {
            failed = Some(error);
            ControlFlow::Break(())
        }))
    })?;
    failed.map_or(Ok(()), Err)
}

/// What conversations are written with where the format is no conversation.
#[derive(Clone, Copy)]
pub struct Words<'a> {
    /// Makes token ids.
    pub tokenizer: &'a Tokenizer,
    /// Makes texts, and says what is trained.
    pub options: &'a DatasetOptions,
}

/// Writes the rows of `mix` (at most `most`) in another format, and returns how many there were.
///
/// # Errors
/// When a file cannot be read or written, at the first row that is broken or does not fit into the format, and when a conversation is to be a
/// text or ids and there are no `words`.
pub fn convert(
    mix: &Mix,
    columns: &ColumnMap,
    most: Option<usize>,
    format: Format,
    words: Option<Words>,
    output: &Path,
    watch: &mut dyn Watch,
) -> Result<usize> {
    let mut out = RowsFile::create(output, format)?;
    let encoder = words.map(|w| RowEncoder::new(Some(w.tokenizer), &w.options.template, w.options.train_on));
    let mut written = 0;
    rows(mix, columns, watch, &mut |_, _, row| {
        if Some(written) == most {
            return Ok(ControlFlow::Break(()));
        }
        let value = match (format, row.conversation(), &words, &encoder) {
            (Format::Tokens, _, _, Some(encoder)) => {
                let example = encoder.encode(&row)?;
                json!({"input_ids": example.input_ids, "labels": example.labels})
            }
            (Format::Text, Some(conversation), Some(words), _) => {
                let template = template_for(&words.options.template, &row);
                json!({"text": template.render(&conversation, false).map_err(RowFault::Encode)?})
            }
            _ => row.write(format)?,
        };
        written += 1;
        out.write(&value).map_err(RowFault::Encode)?;
        Ok(ControlFlow::Continue(()))
    })?;
    out.finish()?;
    Ok(written)
}

fn template_for<'a>(template: &'a Template, row: &Row) -> &'a crate::template::ChatTemplate {
    match row {
        Row::Alpaca(_) => &template.alpaca,
        Row::Conversation(conversation) => template.of(conversation),
        _ => &template.conversation,
    }
}

type UseParsed<'a> = dyn FnMut(&Path, Place, Row) -> Result<ControlFlow<()>, RowFault> + 'a;

fn rows(mix: &Mix, columns: &ColumnMap, watch: &mut dyn Watch, use_row: &mut UseParsed) -> Result<()> {
    let mut seen = 0;
    for (source, _) in &mix.parts {
        for file in source.files(mix.split)? {
            let total = size_of(&file)?;
            let mut stopped = false;
            for_each_row(&file, &mut |raw| {
                let fault = |fault| Error::Row { path: file.clone(), place: raw.place, fault: Box::new(fault) };
                let row = columns.apply(raw.value).and_then(Row::parse).map_err(fault)?;
                stopped = use_row(&file, raw.place, row).map_err(fault)?.is_break();
                seen += 1;
                if seen % OFTEN == 0 && watch.reading(&file, raw.bytes_read, total, seen).is_break() {
                    return Err(Error::Interrupted);
                }
                Ok(if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            if stopped {
                return Ok(());
            }
        }
    }
    Ok(())
}
