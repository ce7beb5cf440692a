"""What report.py writes above each page: titles, records, and what the paper has."""

MODEL = {
    "smollm2-135m": "SmolLM2-135M-Instruct (Q4_1)",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B-Instruct (Q4_K_M)",
}
TITLES = {
    "error": "Error against sparsity, by policy",
    "policies": "Perplexity against sparsity, by policy",
    "tuned": "Perplexity with every head's own settings",
    "qwen": "Qwen2.5-Coder",
    "qwen-1.5b": "Qwen2.5-Coder-1.5B",
    "wikitext": "Perplexity on WikiText-2",
    "length": "Sparsity against length",
    "local": "Blocks before the diagonal, always kept",
    "stages": "Stage 1, stage 2, both",
    "judge": "The self-similarity judge",
    "overhead": "Cost of the prediction against length",
    "order": "Order of tokens",
    "needle": "Retrieval",
    "qwen-error": "Error against sparsity on Qwen2.5-Coder",
    "oracle": "Perplexity against the oracle",
    "compensation": "Standing in for skipped blocks",
}
#: The records that a page is made of, where not the one of its name.
RECORDS = {
    "error": ["error", "error-flexprefill"], "policies": ["perplexity", "local", "perplexity-flexprefill"], "stages": ["perplexity"], "judge": ["judge", "perplexity"],
    "length": ["length", "tuned"], "qwen": ["qwen", "qwen-32k", "qwen-policies"],
    "qwen-1.5b": ["qwen-1.5b", "qwen-1.5b-16k", "qwen-1.5b-samples", "qwen-1.5b-tuned"],
    "wikitext": ["wikitext", "wikitext-why", "wikitext-flexprefill", "wikitext-policies"],
    "needle": ["needle", "needle-8k", "needle-qwen", "needle-qwen-keys"], "oracle": ["oracle"],
}
#: What has to be given to measure.py for a record.
NEEDS = {
    "tuned": "--calibration FILE", "length": "--calibration FILE", "qwen": "--calibration FILE",
    "needle": "--calibration FILE", "wikitext": "--wikitext FILE --calibration FILE",
    "wikitext-why": "--wikitext FILE", "wikitext-flexprefill": "--wikitext FILE",
    "wikitext-policies": "--wikitext FILE", "needle-8k": "--calibration FILE", "needle-qwen": "--calibration FILE",
    "needle-qwen-keys": "--calibration FILE", "qwen-1.5b-tuned": "--calibration FILE",
    "qwen-1.5b-tuned-8k": "--calibration FILE",
}
#: The lengths of a page, where it does not show all that its records have.
SHOWN = {"policies": [4096]}
#: What the paper has on the same question.
PAPER = {
    "error": "The paper compares at each method's own settings and reports quality, not error (its "
             "Table 1); its tuning bounds are relative L1 (0.08, 0.09) for Llama-3.1-8B.",
    "policies": "Table 1, Llama-3.1-8B at 128K: SpargeAttn 54% sparse, perplexity 6.013 → 6.020; MInference "
                "and FlexPrefill lose quality at 30 to 50%.",
    "tuned": "Table 1, Llama-3.1-8B, 128K: 6.013 dense, 6.020 at 54% sparsity, tuned at relative L1 (0.08, 0.09).",
    "wikitext": "Table 1, Llama-3.1-8B, 128K: 6.013 dense, 6.020 at 54% sparsity (tuned).",
    "qwen": "Table 7, Llama-3.1-8B at a fixed error bound: 8K 6.8%, 16K 26.4%, 24K 35.7%, 48K 49.8%, 128K 54%.",
    "qwen-1.5b": "Table 1, Llama-3.1-8B at 128K: 6.013 dense, 6.020 at 54% sparsity (tuned).",
    "local": "It keeps what it selects, blocks that are not self-similar, the diagonal and, if asked, the first block.",
    "length": "Llama-3.1-8B at a fixed error bound: 8K 6.8%, 16K 26.4%, 24K 35.7%, 48K 49.8%, 128K 54%.",
    "stages": "Table 6, Llama-3.1-8B at 128K: stage 1 alone 51.2%, stage 2 alone 27.7%, both 54%.",
    "judge": "Tables 5 and 10, Mochi: without the judge VQA-a falls from 54.18 to 34.66.",
    "overhead": "Table 3, Llama-3.1-8B on a GPU: 8K 3.78%, 16K 1.82%, 32K 0.91%, 64K 0.61%, 128K 0.52%.",
    "order": "Row-major → Hilbert: sparsity 0.242 → 0.265 (CogVideoX), 0.363 → 0.392 (Mochi); "
             "self-similarity of K blocks 0.435 → 0.523, 0.390 → 0.479.",
    "needle": "Needle in a haystack, Llama-3.1-8B at 128K: dense 0.907, SpargeAttn 0.909 at 54%.",
    "qwen-error": "The paper compares at each method's own settings and reports quality, not error (its "
                  "Table 1); its tuning bounds are relative L1 (0.08, 0.09) for Llama-3.1-8B.",
    "oracle": "It reports no oracle; its own pooling is the first prediction.",
    "compensation": "It drops skipped blocks, denominator included.",
}
