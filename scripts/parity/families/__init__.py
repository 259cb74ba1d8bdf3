"""The list of checkpoints, family by family."""

from parity.families import cohere, deepseek, gemma, gpt_oss, granite, llama, mistral, phi, qwen

FIXTURES = {
    name: spec
    for family in (llama, qwen, deepseek, mistral, gemma, phi, gpt_oss, granite, cohere)
    for name, spec in family.FIXTURES.items()
}
