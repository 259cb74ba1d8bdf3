"""Fixtures for chat templates and loss masks: what `transformers` renders, tokenizes and marks.

    make-template-fixtures.py [--templates DIR] [--output DIR]

Every `*.jinja` of DIR (default: the fixtures of pmetal-data) is rendered with the conversations below. Where a template has
`{% generation %}` tags, `return_assistant_tokens_mask` says which tokens the assistant's are. Written are `tokenizer.json`, a
small byte-level BPE trained on the conversations, and `expected.json`. The tests hold our rendering, our ids and our masks
against them, once with the tags and once with the tags taken out. With another DIR (say, the `chat_templates` folder of TRL)
and `PMETAL_TEMPLATE_FIXTURES` set to the output folder, the same test reads those.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent.parent / "crates/pmetal-data/tests/fixtures/templates"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]",
           "<|User|>", "<|Assistant|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|tool|>"]
MARK = re.compile(r"<[|｜][^|｜<>\n'\"]{1,40}[|｜]>|\[/?[A-Z_]{3,30}\]|<\|?(?:start|end)_of_turn\|?>|<\|?turn\|?>")
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "exact": True, "limit": 1.5}}}]
TOOL = [{"type": "function", "function": {"name": "weather", "description": "It's <b>the</b> weather & more",
                                          "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
# What Python's JSON and repr write in ways of their own: integers beyond 64 bits, floats, null, nesting, characters.
ODD = {"int": -3, "big": 18446744073709551615, "float": 1.0, "small": 1e-7, "large": 1e22, "none": None, "no": False,
       "list": [1, "é", {"k": "\"'\\ \n\t</x> \u2028"}], "empty": {}, "text": "it's"}


def call(name, arguments, number):
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, number, name="weather"):
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": name, "content": text}


CONVERSATIONS = {
    "one round": {"messages": [user("What is 2 + 2?"), assistant("It is 4.")]},
    "system and three rounds": {"messages": [
        system("Be brief."), user("Hi"), assistant("Hello!"), user("And?"), assistant("And what?\n\nTell me."), user("Bye"),
        assistant("Bye 👋🏽, à bientôt.")]},
    "three rounds": {"messages": [
        user("Hi"), assistant("Hello!"), user("And?"), assistant("And what?"), user("Bye"), assistant("Bye.")]},
    "spaces at the ends": {"messages": [user("  Hi \n"), assistant("\n Hello! \n"), user("x\n\n"), assistant("  y")]},
    "the same words": {"messages": [user("ok"), assistant("ok"), user("ok"), assistant("ok")]},
    "thoughts in the text": {"messages": [
        user("1 + 1"), assistant("<think>\nOne and one.\n</think>\n\nTwo."), user("1 + 2"),
        assistant("<think>\nOne and two.\n</think>\n\nThree.")]},
    "thoughts apart": {"messages": [
        user("1 + 1"), assistant("Two.", reasoning_content="One and one."), user("1 + 2"),
        assistant("Three.", thinking="One and two.")]},
    "an empty answer": {"messages": [user("Say nothing."), assistant(""), user("Thanks."), assistant("Sure.")]},
    "the assistant begins": {"messages": [assistant("Welcome."), user("Hi"), assistant("What can I do?")]},
    "the user ends": {"messages": [user("Hi"), assistant("Hello!"), user("Are you there?")]},
    "two answers": {"messages": [user("Hi"), assistant("Hello!"), assistant("How are you?")]},
    "tools": {"messages": [
        user("Weather?"), assistant("Let me see.", tool_calls=CALL), {"role": "tool", "content": "12 °C"}, assistant("Cool.")],
        "tools": TOOL},
    "calls and results": {"messages": [
        system("Use tools."), user("Weather in two towns?"),
        assistant("", tool_calls=[call("weather", {"city": "Bern"}, 1)]), result("7 °C", 1),
        assistant("", tool_calls=[call("weather", {"city": "Genf"}, 2)]), result("9 °C", 2),
        assistant("Seven and nine."), user("Thanks."), assistant("You are welcome.")],
        "tools": TOOL},
    "two calls at once": {"messages": [
        user("Weather in two towns?"),
        assistant("", tool_calls=[call("weather", {"city": "Bern"}, 1), call("weather", {"city": "Genf"}, 2)]),
        result("7 °C", 1), result("9 °C", 2), assistant("Seven and nine.")],
        "tools": TOOL},
    "thoughts and calls": {"messages": [
        user("Hi"), assistant("Hello!", reasoning_content="A greeting."), user("Weather?"),
        assistant("", reasoning_content="I need the tool.", tool_calls=[call("weather", {"city": "Bern"}, 1)]),
        result("7 °C", 1), assistant("Seven.", reasoning_content="It said seven.")],
        "tools": TOOL},
    "odd arguments": {"messages": [
        user("Go."), assistant("", tool_calls=[call("weather", ODD, 1)]), result("ok", 1), assistant("Done.")],
        "tools": TOOL},
    "a call ends": {"messages": [user("Go."), assistant("", tool_calls=[call("weather", {"city": "Bern"}, 1)])], "tools": TOOL},
    "an empty system": {"messages": [system(""), user("Hi"), assistant("Hello!")]},
    "a developer": {"messages": [{"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Hello!")]},
    "no content": {"messages": [user("Go."), {"role": "assistant", "content": None, "tool_calls": [call("weather", {}, 1)]},
                                result("ok", 1), assistant("Done.")], "tools": TOOL},
    "braces and marks": {"messages": [user("{{ x }} {% y %} <|im_end|>"), assistant("<tool_call> {# z #}</think> \\n")]},
}


# What the assistant says in public templates without tags, by the formats their makers document: between the header (as the
# generation prompt writes it) and the mark that ends the turn, that mark included. Templates are found by their file's name.
CHATML = (r"<\|im_start\|>assistant\n", r"<\|im_end\|>")
LLAMA = (r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>|<\|eom_id\|>")
HAND = {
    "Qwen-Qwen2.5-7B-Instruct": CHATML,
    "Qwen-Qwen3-0.6B": CHATML,
    "Qwen3-Coder": CHATML,
    "Qwen-QwQ-32B": (CHATML[0] + r"(?:<think>\n)?", CHATML[1]),
    "HuggingFaceTB-SmolLM3-3B": CHATML,
    "LFM2-8B-A1B": CHATML,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": CHATML,
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA,
    "meta-llama-Llama-3.2-3B-Instruct": LLAMA,
    "meta-llama-Llama-3.3-70B-Instruct": LLAMA,
    "google-gemma-2-2b-it": (r"<start_of_turn>model\n", r"<end_of_turn>"),
    "microsoft-Phi-3.5-mini-instruct": (r"<\|assistant\|>\n", r"<\|end\|>"),
    "openai-gpt-oss-120b": (r"<\|start\|>assistant", r"<\|call\|>|<\|return\|>|<\|end\|>(?!<\|start\|>assistant)"),
    "ibm-granite-granite-3.3-2B-Instruct": (r"<\|start_of_role\|>assistant<\|end_of_role\|>", r"<\|end_of_text\|>"),
    "ibm-granite-granite-4.0": (r"<\|start_of_role\|>assistant<\|end_of_role\|>", r"<\|end_of_text\|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": (r"\[/INST\]|\[/TOOL_RESULTS\](?!\[TOOL_RESULTS\])", r"</s>"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (r"<｜Assistant｜>|<｜tool▁outputs▁end｜>", r"<｜end▁of▁sentence｜>"),
}


def marked_by_hand(name, tokenizer, text):
    header, end = HAND[name]
    spans = [m.span(1) for m in re.finditer(f"(?:{header})((?s:.*?)(?:{end}))", text)]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [int(any(a < e and b > s for s, e in spans)) for a, b in offsets]


def make_tokenizer(folder, sources):
    # The marks templates write: special tokens, as in the models they are of.
    written = sorted({mark for source in sources for mark in MARK.findall(source)} - set(SPECIAL))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400 + len(written), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL + written,
                                  show_progress=False)
    text = [m["content"] or "" for c in CONVERSATIONS.values() for m in c["messages"]]
    tokenizer.train_from_iterator(text + ["assistant\n\nuser\nsystem\n\n:\n\n.\n\n"] * 4, trainer)
    tokenizer.add_tokens(PLAIN)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def expected(name, tokenizer, template, conversation):
    arguments = {"chat_template": template, "tools": conversation.get("tools")}
    try:
        text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, **arguments)
    except TemplateError as error:
        # A template refuses with exactly this class; its heirs are mistakes of the template.
        return {"error" if type(error) is TemplateError else "fails": str(error)}
    except Exception as error:
        return {"fails": str(error)}
    marked = "{%" in template and "endgeneration" in template
    out = tokenizer.apply_chat_template(conversation["messages"], tokenize=True, return_dict=True,
                                        return_assistant_tokens_mask=marked, **arguments)
    assert out["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = out["assistant_masks"] if marked else marked_by_hand(name, tokenizer, text) if name in HAND else None
    return {"text": text, "ids": out["input_ids"], "mask": mask}


def prompt(tokenizer, template):
    try:
        return tokenizer.apply_chat_template(CONVERSATIONS["one round"]["messages"][:1], chat_template=template, tokenize=False,
                                             add_generation_prompt=True)
    except Exception:
        return None


# Built-in templates and the public ones whose text they write.
NAMED = {"gemma": "google-gemma-2-2b-it", "mistral": "mistralai-Mistral-Nemo-Instruct-2407", "phi-3": "microsoft-Phi-3.5-mini-instruct",
         "deepseek-r1": "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "qwen-2.5": "Qwen-Qwen2.5-7B-Instruct",
         "qwen-3": "Qwen-Qwen3-0.6B"}


def named(tokenizer, folder):
    """What public templates make of conversations of plain text, with and without a generation prompt."""
    out = {}
    for name, public in NAMED.items():
        source = (folder / f"{public}.jinja").read_text()
        for case, conversation in CONVERSATIONS.items():
            messages = conversation["messages"]
            if "tools" in conversation or any(len(message) > 2 for message in messages):
                continue
            try:
                texts = [tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=prompt)
                         for prompt in (False, True)]
            except TemplateError:
                continue
            out.setdefault(name, []).append({"messages": messages, "text": texts[0], "prompt": texts[1]})
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, default=HERE)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--named", type=Path, help="write what the public templates in DIR make of plain conversations to this file")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sources = {path: path.read_text() for path in sorted(arguments.templates.glob("*.jinja"))}
    tokenizer = make_tokenizer(arguments.output, sources.values())
    if arguments.named:
        arguments.named.write_text(json.dumps(named(tokenizer, arguments.templates), ensure_ascii=False, indent=0) + "\n")
    templates = {}
    for path, source in sources.items():
        if path.parent.resolve() != arguments.output.resolve():
            shutil.copyfile(path, arguments.output / path.name)
        cases = {name: expected(path.stem, tokenizer, source, c) for name, c in CONVERSATIONS.items()}
        templates[path.stem] = {"prompt": prompt(tokenizer, source), "cases": cases}
    out = json.dumps({"conversations": CONVERSATIONS, "templates": templates}, ensure_ascii=False, indent=0)
    # Lists on one line keep the file short.
    (arguments.output / "expected.json").write_text(out.replace(",\n", ",").replace("[\n", "[").replace("\n]", "]") + "\n")


if __name__ == "__main__":
    main()
