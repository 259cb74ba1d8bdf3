"""Text in many scripts to train small vocabularies with."""

CORPUS = [
    "The cat sat on the mat. The dog didn't; it's 12 years old, isn't it? They'll say we've seen 1234567 of 100 dogs.\n\n",
    "In 2024, 365 days passed, 24 hours each: 3.14159 and 2.71828 are numbers, 1000000 too.\n",
    "    if x == 10:\n        return  x + 1\n\n    else:\n        return None\t# 0x1234 comment\r\n",
    "Größe, naïve café, Ærø; Привет, мир! Как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ١٢٣.\n",
    "你好，世界。今天是二〇二四年。こんにちは世界、元気ですか。안녕하세요 세계.\n",
    "Hello World! HELLO WORLD'S camelCaseWord SHOUT's It'S We'LL a/b/c path/to/file.txt (a+b)=[c]{d}<e>|f|^~`g`\n",
    "🙂🙂 👩‍👩‍👧 ½ ² Ⅷ → ∞ … “quoted” — dash – $5.00 €7 £8 100% #1 @home &c. * * *\n",
]

# What splitters treat in their own ways.
TEXTS = [
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n", " \n \n  x", "\t\tx\t y", "a\r\nb\r\n\r\nc", "trailing   ", "   leading",
    "Hello World!", "hello world, it's me; IT'S ME; I'Ve, we'LL, 'tis, rock'n'roll", "12", "123", "1234", "12345678901", "a1b22c333",
    "3.14159 x 10^23 = -7e+5", "١٢٣٤ ½² Ⅷ 五百", "zebra", " zebra", "a quagga", "quagga", "camelCaseWord HTMLParser iPhone",
    "Größe naïve café", "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "你好，世界。", "こんにちは世界", "안녕하세요 세계", "हिन्दी में",
    "ภาษาไทย", "🙂", "🙂🙂 👩‍👩‍👧!", "a\u00a0b\u2003c\u3000d", "\u200bzero\u200bwidth", "    if x == 10:\n        return  x + 1\n",
    "path/to/file.txt?a=1&b=2#c", "!!!\n\n\n???\n", "...---...", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|endoftext|>", "a <|im_end|> b", "<think>\nhm\n</think>\n\nyes", "<|im_start", "|im_end|>", "<s>a</s> b", "<unk>", "▁a ▁▁b",
    "<|user|>\n  a<|end|>\n<s>  b</s>  c", "\u2029\u2028 x\u00a9", "\n\n\x0b\n\n", "don\u2019t \U0001d7d8\U0001d7d9 \U00020bb7", "x" * 100, "ab" * 60, " " * 40 + "x", "\n" * 20, "0" * 50, "é́̂", "\u0000\u0001\u007f", "The quick brown fox jumps over the lazy dog.",
]
