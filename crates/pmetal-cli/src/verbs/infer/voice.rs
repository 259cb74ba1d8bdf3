use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use pmetal::{
    data::{Conversation, Message, Prompt, Template, Tokenizer},
    lora::AdapterFile,
    models::{Checkpoint, Error as ModelError},
};

use super::args::{Args, STDIN};
use crate::{
    tell::tell,
    thinking::{BRACKETS, THINK, Tags},
    verbs::{Failure, Result},
};

/// A model's way to read and write text: its tokenizer, template and ends, with an adapter or without.
pub struct Voice {
    /// The adapter as the user named it.
    pub name: Option<String>,
    pub adapter: Option<AdapterFile>,
    pub tokenizer: Tokenizer,
    /// None where nothing goes through it.
    template: Option<Template>,
    system: Option<String>,
    /// Whether plain prompts go through the template.
    chat: bool,
    /// The model's context, in tokens.
    context: usize,
    eos_ids: Vec<u32>,
    turn_ends: TurnEnds,
    /// Tags of reasoning.
    pub tags: Vec<Tags>,
    /// Those that are special tokens, which decoding leaves out.
    pub tag_ids: HashMap<u32, &'static str>,
}

/// How the template ends a turn.
#[derive(Default)]
struct TurnEnds {
    id: Option<u32>,
    /// Where the model has no such token.
    text: Option<String>,
}

/// A prompt as the model reads it.
pub struct Prepared {
    /// Its text, through the template where it goes through one.
    pub text: String,
    pub ids: Vec<u32>,
    /// What ends the completion.
    pub stop_ids: Vec<u32>,
    /// Texts that end it too.
    pub stop_texts: Vec<String>,
}

/// What to do where the prompt was to come from stdin.
const NO_STDIN: &str = "; give a --prompt or a --prompt-file, or chat at a terminal";

/// Two contents no template treats in a special way.
const PROBES: [&str; 2] = ["Kestrel flew", "Wagon stood up"];

impl Voice {
    /// Opens tokenizer, template and adapter, and reads no weights of the model.
    pub fn open(args: &Args, checkpoint: &Checkpoint, adapter: Option<&Path>, with_template: bool) -> Result<Self> {
        let path = adapter.map(|named| args.model.adapter_path(named)).transpose()?;
        let tokenizer = args.model.tokenizer(checkpoint, path.as_deref())?;
        let choice = args.chat_template.clone().unwrap_or_default();
        let template = with_template.then(|| Template::choose(&choice, &tokenizer)).transpose()?;
        let mut eos_ids: BTreeSet<u32> = checkpoint.generation().eos_token_ids.iter().copied().collect();
        eos_ids.extend(tokenizer.eos_ids());
        let mut tags = vec![THINK];
        tags.extend(tokenizer.token_to_id(BRACKETS.0).map(|_| BRACKETS));
        let mut tag_ids = HashMap::new();
        for tag in tags.iter().flat_map(|&(open, close)| [open, close]) {
            if let Some(id) = tokenizer.token_to_id(tag)
                && tokenizer.decode(&[id])?.is_empty()
            {
                tag_ids.insert(id, tag);
            }
        }
        Ok(Self {
            name: adapter.map(|path| path.display().to_string()),
            adapter: path.as_deref().map(AdapterFile::open).transpose()?,
            turn_ends: template.as_ref().map(|template| turn_ends(template, &tokenizer)).unwrap_or_default(),
            tokenizer,
            template,
            system: args.system.clone(),
            chat: args.chat,
            context: checkpoint.spec().max_position_embeddings,
            eos_ids: eos_ids.into_iter().collect(),
            tags,
            tag_ids,
        })
    }

    /// Says that a template was chosen that the model did not come with.
    pub fn note_template(&self, args: &Args) {
        let chosen = args.chat_template.clone().unwrap_or_default() != Default::default();
        if let Some(name) = self.template.as_ref().and_then(|template| template.origin().strip_prefix("built in: "))
            && !chosen
        {
            let line = format!("the model has no chat template: using {name}; --chat-template names another");
            tell(line);
        }
    }

    /// The ids of a prompt, checked: there is something to read, and the context has room for an answer. The system turn of the flag
    /// goes before a conversation that has none.
    pub fn prepare(&self, prompt: &Prompt, origin: &str) -> Result<Prepared> {
        let mut conversation = match (prompt, self.chat) {
            (Prompt::Text(text), false) => return self.continue_text(text, origin),
            (Prompt::Text(text), true) if text.trim().is_empty() => {
                return empty(origin, if origin == STDIN { NO_STDIN } else { "" });
            }
            (Prompt::Text(text), true) => {
                Conversation { messages: vec![Message::new("user", text)], ..Conversation::default() }
            }
            (Prompt::Conversation(conversation), _) => conversation.clone(),
        };
        let no_system = conversation.messages.iter().all(|message| message.role() != "system");
        if let Some(system) = self.system.as_ref().filter(|_| no_system) {
            conversation.messages.insert(0, Message::new("system", system));
        }
        self.prepare_conversation(&conversation)
    }

    /// The ids of a text to continue.
    pub fn continue_text(&self, text: &str, origin: &str) -> Result<Prepared> {
        let ids = self.tokenizer.encode(text, true)?;
        if ids.is_empty() {
            let alone = ", and this model has no token to begin a text with";
            return empty(origin, if origin == STDIN { NO_STDIN } else { alone });
        }
        self.fits(&ids)?;
        Ok(Prepared { text: text.to_owned(), ids, stop_ids: self.eos_ids.clone(), stop_texts: Vec::new() })
    }

    /// The ids of a conversation up to the beginning of its answer.
    pub fn prepare_conversation(&self, conversation: &Conversation) -> Result<Prepared> {
        let Some(template) = &self.template else {
            return Err(Failure::Usage("a conversation goes through a chat template: add --chat".into()));
        };
        let text = template.render_prompt(conversation)?;
        let ids = self.tokenizer.encode(&text, false)?;
        self.fits(&ids)?;
        let stop_ids = self.eos_ids.iter().copied().chain(self.turn_ends.id).collect();
        Ok(Prepared { text, ids, stop_ids, stop_texts: self.turn_ends.text.iter().cloned().collect() })
    }

    fn fits(&self, ids: &[u32]) -> Result<()> {
        if ids.len() < self.context {
            return Ok(());
        }
        Err(ModelError::Context { prompt: ids.len(), context: self.context }.into())
    }

    /// The text that `id` adds behind `before`; of a token that adds none, its name.
    pub fn token_text(&self, before: Option<u32>, id: u32) -> Result<String> {
        let alone = self.tokenizer.decode(&[id])?;
        if alone.is_empty() {
            return Ok(self.tokenizer.token(id).unwrap_or_default());
        }
        let Some(before) = before else { return Ok(alone) };
        let (left, both) = (self.tokenizer.decode(&[before])?, self.tokenizer.decode(&[before, id])?);
        Ok(both.strip_prefix(&left).map_or(alone, str::to_owned))
    }
}

fn empty<T>(origin: &str, why: &str) -> Result<T> {
    Err(Failure::Usage(format!("{origin}: is empty{why}")))
}

/// How an answer ends in the template: with a token, or where the model has none for it, with a text.
fn turn_ends(template: &Template, tokenizer: &Tokenizer) -> TurnEnds {
    if let Some(id) = template.end_of_turn(tokenizer) {
        return TurnEnds { id: Some(id), text: None };
    }
    let messages = vec![Message::new("user", PROBES[0]), Message::new("assistant", PROBES[1])];
    // a template that refuses the probes tells nothing
    let text = template.render(&messages, false).unwrap_or_default();
    let behind = text.rsplit_once(PROBES[1]).map(|(_, behind)| behind.trim()).unwrap_or_default();
    let end = behind.lines().next().unwrap_or_default();
    TurnEnds { id: None, text: (!end.is_empty()).then(|| end.to_owned()) }
}
