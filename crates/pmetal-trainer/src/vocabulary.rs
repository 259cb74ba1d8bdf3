//! New tokens: which, where their rows are, and what has to be trained for them.

use std::{fs, path::Path};

use pmetal_data::Tokenizer;
use pmetal_lora::ModulesToSave;

use crate::{Error, FineTuneType, Observer, Result, SftOptions, sft::Base};

/// Adds the tokens that the options ask for to the tokenizer, and makes room for them in the base's tables and in those of the adapter
/// that the run starts from. Ids take rows the tables have already; where those do not suffice, the tables grow.
pub(crate) fn add_tokens(
    options: &SftOptions,
    base: &mut Base,
    tokenizer: Option<&mut Tokenizer>,
    observer: &mut dyn Observer,
) -> Result<()> {
    let lists = [("--add-tokens", &options.add_tokens, true), ("--add-plain-tokens", &options.add_plain_tokens, false)];
    let mut wanted = lists.into_iter().filter_map(|(flag, list, special)| Some((flag, list.as_deref()?, special)));
    let Some(first) = wanted.next() else { return Ok(()) };
    let Some(tokenizer) = tokenizer else {
        let reason = format!("{} has no tokenizer to add tokens to", options.model.display());
        return Err(Error::Option { option: first.0, reason });
    };
    let mut added = Vec::new();
    for (flag, list, special) in [first].into_iter().chain(wanted) {
        let tokens = read_list(list).map_err(|reason| Error::Option { option: flag, reason })?;
        let known: Vec<&String> = tokens.iter().filter(|token| tokenizer.token_to_id(token).is_some()).collect();
        if !known.is_empty() {
            observer
                .note(&format!("in the vocabulary already: {}", shown(known.into_iter().map(|token| (token, None)))));
        }
        added.extend(tokenizer.add_tokens(&tokens, special)?);
    }
    let rows = base.spec.vocab_size;
    let needed = tokenizer.rows().max(rows);
    let needed = options.pad_to_multiple_of.map_or(needed, |multiple| needed.next_multiple_of(multiple));
    if added.is_empty() && needed == rows {
        return Ok(());
    }
    let fresh: Vec<u32> = added.iter().map(|(_, id)| *id).collect();
    base.resize_vocabulary(needed, &fresh)?;
    let room =
        if needed == rows { format!("in the {rows} rows there are") } else { format!("from {rows} to {needed} rows") };
    let tokens = shown(added.iter().map(|(token, id)| (token, Some(*id))));
    observer.note(&match added.len() {
        0 => format!("no new token, {room}"),
        1 => format!("a new token, {room}: {tokens}"),
        more => format!("{more} new tokens, {room}: {tokens}"),
    });
    save_tables(options, base, observer);
    Ok(())
}

/// A new token says nothing until its rows are trained, and an adapter without them would lose them.
fn save_tables(options: &SftOptions, base: &mut Base, observer: &mut dyn Observer) {
    if options.fine_tune_type != FineTuneType::Lora {
        return;
    }
    let needed = ModulesToSave { embed_tokens: true, lm_head: !base.spec.tie_word_embeddings };
    let all = base.modules_to_save.and(needed);
    if all != base.modules_to_save {
        let names = needed.names().join(",");
        observer.note(&format!(
            "--modules-to-save {names} is on: new tokens have rows to train, which are saved with the adapter"
        ));
    }
    base.modules_to_save = all;
}

/// The tokens of a list with commas, or of a file: a JSON list of strings, or one token a line.
fn read_list(list: &str) -> Result<Vec<String>, String> {
    let path = Path::new(list);
    let tokens: Vec<String> = if path.is_file() {
        let text = fs::read_to_string(path).map_err(|e| format!("cannot read {list}: {e}"))?;
        if text.trim_start().starts_with('[') {
            serde_json::from_str(&text).map_err(|e| format!("{list}: expected a JSON list of strings: {e}"))?
        } else {
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
        }
    } else {
        list.split(',').map(|token| token.trim().to_owned()).collect()
    };
    if tokens.is_empty() || tokens.iter().any(String::is_empty) {
        return Err(format!("{list:?} has an empty token: name tokens with commas between, or a file with one a line"));
    }
    Ok(tokens)
}

/// The first few tokens, with their ids where they have one to show.
fn shown<'a>(tokens: impl ExactSizeIterator<Item = (&'a String, Option<u32>)>) -> String {
    const MOST: usize = 8;
    let more = tokens.len().saturating_sub(MOST);
    let one = |(token, id): (&String, Option<u32>)| id.map_or(token.clone(), |id| format!("{token} = {id}"));
    let mut text = tokens.take(MOST).map(one).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_files_of_tokens() {
        assert_eq!(read_list("<|call|>, <|result|>").unwrap(), ["<|call|>", "<|result|>"]);
        for refused in ["", "a,,b"] {
            assert!(read_list(refused).unwrap_err().contains("empty token"));
        }
        let folder = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = folder.path().join("tokens");
            fs::write(&path, text).unwrap();
            read_list(path.to_str().unwrap())
        };
        assert_eq!(file("<a>\n\n<b, c>\n").unwrap(), ["<a>", "<b, c>"]);
        assert_eq!(file("[\"<a>\", \"<b, c>\"]").unwrap(), ["<a>", "<b, c>"]);
        assert!(file("[1]").unwrap_err().contains("list of strings"));
        assert!(file("\n").is_err());
    }
}
