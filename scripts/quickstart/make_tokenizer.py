"""Trains the quickstart's byte-level BPE on the base conversations and writes the folder the base model is trained from.

    python scripts/quickstart/make_tokenizer.py     # tokenizers 0.23.3, after make_corpus.py

    assets/quickstart/base/{tokenizer,tokenizer_config,config,generation_config}.json
"""

import json
from itertools import islice

from make_corpus import ASSETS, REPOSITORY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, TURN_START, TURN_END = range(3)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 1536
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.04,
    "tie_word_embeddings": True,
    "bos_token_id": TURN_START,
    "eos_token_id": TURN_END,
    "pad_token_id": END_OF_TEXT,
    "torch_dtype": "bfloat16",
}


def texts(path, count=40_000):
    with open(path, encoding="utf-8") as file:
        for line in islice(file, count):
            for message in json.loads(line)["messages"]:
                yield message["role"] + "\n" + message["content"]


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(REPOSITORY / "target/quickstart/base.jsonl"), trainer)
    return tokenizer


def main():
    folder = ASSETS / "base"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config": MODEL,
        "generation_config": {
            "bos_token_id": TURN_START, "eos_token_id": [TURN_END, END_OF_TEXT], "pad_token_id": END_OF_TEXT, "do_sample": False
        },
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
            "model_max_length": MODEL["max_position_embeddings"], "chat_template": CHATML,
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(folder)


if __name__ == "__main__":
    main()
