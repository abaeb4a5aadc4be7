"""Figures that others published for these benchmarks: shown beside ours, never as ours."""

from typing import Final

from pipeline.display.table import ResultTable

PTA_LLM: Final = ResultTable(
    "Published, not measured here: PTA-LLM, arXiv 2509.17276, Table 2 (7B models, in percent; as transcribed in the notes "
    "on the paper at papernotes.org, where the averages and the relative gains agree with the rows)",
    ("benchmark (tasks)", "OpenLLaMA", "MPT", "Llama-2", "FuseLLM", "PTA-LLM"),
    (
        ("GSM8K (1)", "7.81", "9.17", "14.18", "14.56", "14.71"),
        ("BBH (27)", "33.87", "33.38", "39.70", "41.01", "41.08"),
        ("MultiPL-E (10)", "18.11", "17.26", "14.63", "15.56", "15.88"),
        ("MMLU (17)", "42.11", "27.84", "46.94", "48.77", "49.38"),
        ("ToxiGen (14)", "18.94", "18.42", "18.56", "18.19", "18.89"),
        ("TyDi QA (9)", "27.32", "22.11", "31.42", "32.99", "34.07"),
        ("average", "24.69", "21.36", "27.57", "28.51", "29.00"),
    ),
)
FUSE_LLM: Final = ResultTable(
    "Published, not measured here: FuseLLM-7B's model card (arXiv 2401.10491), the benchmarks that are suites here, in percent",
    ("benchmark", "OpenLLaMA-7B", "MPT-7B", "Llama-2-7B", "Llama-2-CLM-7B", "FuseLLM-7B"),
    (
        ("BBH", "33.87", "33.38", "39.70", "40.44", "41.75"),
        ("MultiPL-E", "18.11", "17.26", "14.63", "14.83", "15.56"),
        ("LAMBADA", "70.31", "70.08", "73.28", "73.45", "73.72"),
    ),
)
PUBLISHED: Final = (PTA_LLM, FUSE_LLM)
CAVEAT: Final = (
    "Prompts and few-shot counts behind these figures are not known to us. They count MMLU as 17 tasks and MultiPL-E as 10, "
    "and ToxiGen as 14 with figures that cannot be the two-way accuracy measured here: compare the models of one table, not "
    "figures across tables."
)
