use std::{collections::HashSet, ops::Range, sync::Arc};

use serde_json::Value;

use crate::{
    conversation::{Conversation, Message},
    error::{Error, Result, RowFault},
    mask::{TrainOn, TurnShape, Turns},
    row::Row,
    template::{ChatTemplate, Prepared, Template},
    tokenizer::Tokenizer,
    view::{self, TokenView},
};

/// The label of a token that is not trained.
pub(crate) const IGNORE: i64 = -100;

/// A tokenized row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, `[tokens]`.
    pub input_ids: Vec<u32>,
    /// `[tokens]`: the id at the same position where it is trained, -100 elsewhere. As in `transformers`, the shift by one
    /// happens in the loss: nothing predicts position 0, whatever its label.
    pub labels: Vec<i64>,
}

impl Example {
    /// Number of trained tokens: those with a label, but for the first of the row.
    pub fn supervised_tokens(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORE).count()
    }

    /// The row, where every id of it is below `vocab_size`.
    pub(crate) fn within(self, vocab_size: usize) -> Result<Self, RowFault> {
        let known = |id: i64| u64::try_from(id).is_ok_and(|id| id < vocab_size as u64);
        let ids = self.input_ids.iter().map(|&id| i64::from(id)).enumerate().map(|(i, id)| ("input_ids", i, id));
        let labels = self.labels.iter().copied().enumerate().filter(|&(_, label)| label != IGNORE);
        match ids.chain(labels.map(|(i, label)| ("labels", i, label))).find(|&(.., id)| !known(id)) {
            Some((key, index, found)) => Err(RowFault::Vocabulary { key, index, found, vocab_size }),
            None => Ok(self),
        }
    }

    fn all_trained(input_ids: Vec<u32>) -> Self {
        let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
        Self { input_ids, labels }
    }
}

/// A row of text with what it was encoded from.
pub(crate) struct Encoded {
    pub(crate) example: Example,
    pub(crate) text: String,
    /// Per token of the text, its place in it, in bytes.
    pub(crate) offsets: Vec<(usize, usize)>,
    /// Tokens before those of the text: what the tokenizer puts before one.
    pub(crate) before: usize,
}

/// A template and what probing it taught.
#[derive(Debug)]
struct Shaped {
    template: Arc<ChatTemplate>,
    shape: TurnShape,
    /// Ids after which nothing more is said: the tokenizer's eos ids and the template's end of turn.
    ends: HashSet<u32>,
}

/// Turns rows into ids and labels.
#[derive(Debug)]
pub(crate) struct RowEncoder<'a> {
    /// What rows of text need.
    rendering: Option<Rendering<'a>>,
}

#[derive(Debug)]
struct Rendering<'a> {
    tokenizer: &'a Tokenizer,
    conversation: Arc<Shaped>,
    tools: Arc<Shaped>,
    alpaca: Arc<Shaped>,
    train_on: TrainOn,
}

impl<'a> RowEncoder<'a> {
    /// An encoder for rows of every format, or, without a tokenizer, for rows of ids.
    pub(crate) fn new(tokenizer: Option<&'a Tokenizer>, template: &Template, train_on: TrainOn) -> Self {
        let rendering = tokenizer.map(|tokenizer| {
            let conversation = Arc::new(Shaped::new(&template.conversation, tokenizer));
            let shaped = |other: &Arc<ChatTemplate>| {
                let same = Arc::ptr_eq(&template.conversation, other);
                if same { Arc::clone(&conversation) } else { Arc::new(Shaped::new(other, tokenizer)) }
            };
            let (tools, alpaca) = (shaped(&template.tools), shaped(&template.alpaca));
            Rendering { tokenizer, conversation, tools, alpaca, train_on }
        });
        Self { rendering }
    }

    /// Ids and labels of one row, of full length. Labels that a row brings are taken as they are.
    ///
    /// A text row is what the tokenizer makes of the text, and eos. A rendered row is encoded as it is: the template writes
    /// bos if it wants one. Where it ends an answer in plain text, so that nothing would teach the model to stop, eos follows.
    pub(crate) fn encode(&self, row: &Row) -> Result<Example, RowFault> {
        match row {
            Row::Tokens { input_ids, labels: Some(labels) } => {
                Ok(Example { input_ids: input_ids.clone(), labels: labels.clone() })
            }
            Row::Tokens { input_ids, labels: None } => Ok(Example::all_trained(input_ids.clone())),
            // where each token stands is of no use here
            Row::Text(text) => {
                let rendering = self.rendering.as_ref().ok_or(RowFault::NoTokenizer)?;
                rendering.text_ids(text).map(Example::all_trained).map_err(RowFault::Encode)
            }
            _ => self.rendered(row).map(|encoded| encoded.example),
        }
    }

    /// One row token by token, as [`RowEncoder::encode`] makes it. The texts joined are what was rendered, with the tokens the
    /// tokenizer or the encoder put around it; a character that takes several tokens is the first one's.
    ///
    /// # Errors
    /// As [`RowEncoder::encode`].
    pub(crate) fn view(&self, row: &Row) -> Result<Vec<TokenView>, RowFault> {
        let tokenizer = self.rendering.as_ref().map(|rendering| rendering.tokenizer);
        if let Row::Tokens { .. } = row {
            return view::ids(&self.encode(row)?, tokenizer).map_err(RowFault::Encode);
        }
        let encoded = self.rendered(row)?;
        let rendering = self.rendering.as_ref().ok_or(RowFault::NoTokenizer)?;
        let ends = match row {
            Row::Conversation(conversation) => &rendering.of(conversation).ends,
            _ => &rendering.alpaca.ends,
        };
        Ok(view::text(&encoded, rendering.tokenizer, ends))
    }

    fn rendered(&self, row: &Row) -> Result<Encoded, RowFault> {
        let rendering = self.rendering.as_ref().ok_or(RowFault::NoTokenizer)?;
        let encoded = match row {
            Row::Conversation(conversation) => rendering.conversation(rendering.of(conversation), conversation),
            Row::Alpaca(alpaca) => rendering.conversation(&rendering.alpaca, &alpaca.conversation()),
            Row::PromptCompletion { prompt, completion } => rendering.completion(prompt, completion),
            Row::Text(text) => rendering.text(text),
            Row::Preference(preference) => return Err(preference.fault()),
            Row::Tokens { .. } => return Err(RowFault::NoTokenizer),
        };
        encoded.map_err(RowFault::Encode)
    }
}

impl Rendering<'_> {
    fn of(&self, conversation: &Conversation) -> &Shaped {
        if conversation.has_tools() { &self.tools } else { &self.conversation }
    }

    /// The ids of a text and eos.
    fn text_ids(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text, true)?;
        let eos = self.tokenizer.eos_ids();
        if let (Some(&eos), false) = (eos.first(), ids.last().is_some_and(|last| eos.contains(last))) {
            ids.push(eos);
        }
        Ok(ids)
    }

    fn text(&self, text: &str) -> Result<Encoded> {
        let ids = self.text_ids(text)?;
        let encoding = self.tokenizer.encode_with_offsets(text)?;
        let inner = encoding.get_ids();
        let before = ids.windows(inner.len().max(1)).position(|window| window == inner).unwrap_or(0);
        let (text, offsets) = (text.to_string(), encoding.get_offsets().to_vec());
        Ok(Encoded { example: Example::all_trained(ids), text, offsets, before })
    }

    /// The two texts as one, with eos: the tokens with a part in the second and eos are trained, or all of them.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Encoded> {
        let mut encoded = self.text(&format!("{prompt}{completion}"))?;
        if self.train_on != TrainOn::All {
            let trained = tokens_in(&encoded.offsets, std::slice::from_ref(&(prompt.len()..encoded.text.len())));
            let untrained = std::iter::repeat_n(true, encoded.before).chain(trained.iter().map(|trained| !trained));
            for (label, untrained) in encoded.example.labels.iter_mut().zip(untrained) {
                *label = if untrained { IGNORE } else { *label };
            }
        }
        Ok(encoded)
    }

    fn conversation(&self, shaped: &Shaped, conversation: &Conversation) -> Result<Encoded> {
        let template = &shaped.template;
        let prepared = Prepared::new(template, conversation);
        let text = template.render_messages(&prepared, prepared.messages(), false);
        let text = text.map_err(|error| about_calls(error, conversation))?;
        let encoding = self.tokenizer.encode_with_offsets(&text)?;
        let mut ids = encoding.get_ids().to_vec();
        let mut trained = if self.train_on == TrainOn::All {
            vec![true; ids.len()]
        } else {
            let turns = Turns {
                template,
                tokenizer: self.tokenizer,
                shape: &shaped.shape,
                conversation,
                prepared: &prepared,
                text: &text,
            };
            let mut trained = tokens_in(encoding.get_offsets(), &turns.spans(self.train_on)?);
            shaped.include_ends(&ids, &mut trained);
            trained
        };
        let answered = conversation.messages.last().is_some_and(|m| m.role() == "assistant" && m.trained());
        if answered {
            shaped.end_row(&text, encoding.get_offsets(), self.tokenizer, &mut ids, &mut trained);
        }
        let label = |(&id, trained): (&u32, bool)| if trained { i64::from(id) } else { IGNORE };
        let labels = ids.iter().zip(trained).map(label).collect();
        let example = Example { input_ids: ids, labels };
        Ok(Encoded { example, text, offsets: encoding.get_offsets().to_vec(), before: 0 })
    }
}

/// A template that knows no tool calls fails at a message that has nothing else: what it says then helps nobody.
fn about_calls(error: Error, conversation: &Conversation) -> Error {
    let silent = |message: &Message| message.object().get("content").is_none_or(Value::is_null);
    let Some(message) = conversation.messages.iter().position(silent) else { return error };
    match error {
        Error::Template { template, line, reason } => {
            let hint = "has tool calls and no content, which this template does not take; --chat-template qwen-3 does";
            Error::Template { template, line, reason: format!("message {message} (from 0) {hint} ({reason})") }
        }
        other => other,
    }
}

impl Shaped {
    fn new(template: &Arc<ChatTemplate>, tokenizer: &Tokenizer) -> Self {
        let shape = TurnShape::learn(template, tokenizer);
        let end_of_turn = shape.end_of_turn.as_deref().and_then(|text| tokenizer.token_to_id(text));
        let ends = tokenizer.eos_ids().iter().copied().chain(end_of_turn).collect();
        Self { template: Arc::clone(template), shape, ends }
    }

    /// Trains the end of turn that follows a trained stretch without one: a template may mark contents only, or end a turn
    /// only once the next begins.
    fn include_ends(&self, ids: &[u32], trained: &mut [bool]) {
        for at in 1..ids.len() {
            let [before, here] = [at - 1, at].map(|i| ids.get(i).is_some_and(|id| self.ends.contains(id)));
            if here && !before && trained.get(at - 1) == Some(&true) {
                trained.iter_mut().skip(at).take(1).for_each(|t| *t = true);
            }
        }
    }

    /// Appends eos, trained, to a row whose last answer ends in plain text, and trains the white space between.
    fn end_row(
        &self,
        text: &str,
        offsets: &[(usize, usize)],
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
        trained: &mut Vec<bool>,
    ) {
        let blank = |&(start, end): &(usize, usize)| text.get(start..end).is_some_and(|t| t.trim().is_empty());
        let spoken = offsets.iter().rposition(|offset| !blank(offset));
        let last = spoken.and_then(|at| ids.get(at)).and_then(|&id| tokenizer.token(id));
        let Some(&eos) = tokenizer.eos_ids().first() else { return };
        if last.is_some_and(|last| tokenizer.special_set().contains(&last)) {
            return;
        }
        ids.push(eos);
        trained.iter_mut().skip(spoken.map_or(0, |at| at + 1)).for_each(|t| *t = true);
        trained.push(true);
    }
}

/// Which tokens have a part in a span. Offsets of some tokenizers leave out the white space a token begins with: a token is
/// taken to start where the one before it ended.
fn tokens_in(offsets: &[(usize, usize)], spans: &[Range<usize>]) -> Vec<bool> {
    let mut end_before = 0;
    let inside = |&(start, end): &(usize, usize)| {
        let start = start.min(end_before);
        end_before = end_before.max(end);
        spans.iter().any(|span| start < span.end && end > span.start)
    };
    offsets.iter().map(inside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_a_span() {
        // Two tokens of one character, then one whose offsets leave out the space before it, then one across the end.
        let offsets = [(0, 4), (4, 7), (4, 7), (8, 10), (10, 12), (12, 13)];
        assert_eq!(tokens_in(&offsets, &[4..7, 8..11]), [false, true, true, true, true, false]);
        assert_eq!(tokens_in(&offsets, &[7..8, 12..13]), [false, false, false, true, false, true]);
        assert_eq!(tokens_in(&offsets, &[]), [false; 6]);
    }

    #[test]
    fn the_first_label_counts_for_nothing() {
        let example = Example { input_ids: vec![5, 6, 7], labels: vec![5, IGNORE, 7] };
        assert_eq!(example.supervised_tokens(), 1);
    }
}
