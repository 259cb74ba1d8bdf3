//! Chat templates, rendered as `transformers` renders them.

mod builtin;
mod depth;
mod environment;
mod generation;
mod python_json;
mod python_str;
mod reads;
mod strftime;

use std::{ops::Range, path::Path, sync::OnceLock};

use minijinja::{Environment, Value, value::Serde};

pub use builtin::{Template, TemplateChoice};
use environment::{Raised, today};
use reads::Reads;

use crate::{
    conversation::{Conversation, Message},
    error::{Error, Result},
};

const NAME: &str = "chat";

/// A compiled chat template: a conversation in, the text the model sees out.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    source: String,
    special_tokens: Vec<(String, String)>,
    marks_generation: bool,
    /// Learnt when the first conversation comes.
    reads: OnceLock<Reads>,
}

/// What a template is given, prepared once for several renderings of one conversation.
pub(crate) struct Prepared {
    messages: Vec<Value>,
    tools: Value,
    reads: Reads,
}

impl ChatTemplate {
    /// Compiles a template. `origin` names it in errors; `special_tokens` are variables as (`bos_token`, `<s>`).
    ///
    /// # Errors
    /// When it is not valid Jinja.
    pub(crate) fn new(origin: &str, source: &str, special_tokens: &[(String, String)]) -> Result<Self> {
        // Jinja reads every kind of line end as one.
        let given = source.to_string();
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        if let Some(line) = depth::overlong_chain(&source) {
            let reason = "an expression too long to be read; split it with {% set %}".to_string();
            return Err(Error::Template { template: origin.to_string(), line: Some(line), reason });
        }
        let (rewritten, marks_generation) = generation::rewrite(&source);
        let mut environment = environment::like_transformers();
        environment.add_template_owned(NAME, rewritten).map_err(|e| template_error(origin, &e))?;
        Ok(Self {
            environment,
            origin: origin.to_string(),
            source: given,
            special_tokens: special_tokens.to_vec(),
            marks_generation,
            reads: OnceLock::new(),
        })
    }

    /// Compiles the template in a file.
    ///
    /// # Errors
    /// When the file cannot be read or is not valid Jinja.
    pub(crate) fn from_file(path: &Path, special_tokens: &[(String, String)]) -> Result<Self> {
        let source =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
        Self::new(&path.display().to_string(), &source, special_tokens)
    }

    /// Where it comes from: a file, or `built in: chatml`.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Its Jinja text, as it was given.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation, followed by the start of an assistant's turn if `add_generation_prompt`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the template's own words, [`Error::Template`] when it fails or takes too long.
    pub(crate) fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String> {
        let prepared = Prepared::new(self, conversation);
        self.render_messages(&prepared, prepared.messages(), add_generation_prompt)
    }

    fn reads(&self) -> &Reads {
        self.reads.get_or_init(|| Reads::learn(self))
    }

    /// The text of some messages of a prepared conversation.
    pub(crate) fn render_messages(&self, prepared: &Prepared, messages: &[Value], prompt: bool) -> Result<String> {
        self.render_with(prepared, messages, prompt, ["", ""])
    }

    /// The text of a whole conversation and the spans (in bytes) its `{% generation %}` tags mark; `None` for a template
    /// without such tags, or that uses what is between them otherwise than by writing it.
    pub(crate) fn render_marked(&self, prepared: &Prepared, text: &str) -> Result<Option<Vec<Range<usize>>>> {
        if !self.marks_generation || text.contains(generation::MARKS) {
            return Ok(None);
        }
        let marks = generation::MARKS.map(String::from);
        let marked = self.render_with(prepared, prepared.messages(), false, [&marks[0], &marks[1]])?;
        Ok(generation::spans(&marked, text))
    }

    fn render_with(&self, prepared: &Prepared, messages: &[Value], prompt: bool, marks: [&str; 2]) -> Result<String> {
        let fixed = [
            ("messages", Value::from(messages)),
            ("tools", prepared.tools.clone()),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(prompt)),
            (generation::BEGIN, Value::from(marks[0])),
            (generation::END, Value::from(marks[1])),
        ];
        let fixed = fixed.into_iter().map(|(name, value)| (name.to_string(), value));
        let special = self.special_tokens.iter().map(|(name, text)| (name.clone(), Value::from(text)));
        let context = Value::from_pairs(special.chain(fixed));
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(context));
        rendered.map_err(|e| template_error(&self.origin, &e))
    }
}

impl Prepared {
    /// The conversation in the form the template reads.
    pub(crate) fn new(template: &ChatTemplate, conversation: &Conversation) -> Self {
        Self::with(*template.reads(), conversation)
    }

    fn with(reads: Reads, conversation: &Conversation) -> Self {
        let tools = conversation.tools.as_ref().filter(|tools| !tools.is_null());
        Self {
            messages: conversation.messages.iter().map(|message| message_value(message, reads)).collect(),
            tools: tools.map_or(Value::from(()), |tools| Value::from(Serde(tools))),
            reads,
        }
    }

    pub(crate) fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// Another message in the same form.
    pub(crate) fn value(&self, message: &Message) -> Value {
        message_value(message, self.reads)
    }
}

/// A message as a template sees it. Like `transformers`, keys without a value are left out, and reasoning, which goes by three
/// names, is filled in under the others that templates read.
fn message_value(message: &Message, reads: Reads) -> Value {
    let mut object = reads.adapt(message.object());
    object.retain(|_, value| !value.is_null());
    let reasoning = ["reasoning_content", "thinking", "reasoning"].into_iter().find_map(|key| object.get(key).cloned());
    if let Some(reasoning) = reasoning {
        if !object.contains_key("thinking") {
            object.shift_insert(0, "thinking".to_string(), reasoning.clone());
        }
        object.insert("reasoning_content".to_string(), reasoning);
    }
    Value::from(Serde(object))
}

fn template_error(origin: &str, error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return Error::Refused { template: origin.to_string(), message: message.clone() };
        }
        cause = current.source();
    }
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    Error::Template { template: origin.to_string(), line: error.line(), reason: format!("{}{detail}", error.kind()) }
}
