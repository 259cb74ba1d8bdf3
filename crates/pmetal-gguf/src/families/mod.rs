//! One file per family: its architectures in GGUF, as differences from [`Architecture::PLAIN`]. What llama.cpp writes is in its
//! `conversion/`, what it assumes where a file is silent in `src/models/`.

mod cohere;
mod deepseek;
mod gemma;
mod gpt_oss;
mod granite;
mod llama;
mod phi3;
mod qwen;

use crate::architecture::Architecture;

/// Every architecture, those of one name beside each other.
pub(crate) const KNOWN: [Architecture; 17] = [
    llama::LLAMA,
    llama::MIXTRAL,
    llama::MISTRAL3,
    llama::LLAMA4,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen::QWEN3MOE,
    deepseek::DEEPSEEK2,
    deepseek::DEEPSEEK32,
    gemma::GEMMA2,
    gemma::GEMMA3,
    phi3::PHI3,
    gpt_oss::GPT_OSS,
    granite::GRANITE,
    granite::GRANITEMOE,
    cohere::COMMAND_R,
    cohere::COHERE2,
];
