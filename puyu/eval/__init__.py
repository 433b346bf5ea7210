"""Evaluation: Sample -> Solver -> Score -> EvalLog -> comparison, through the `LanguageModel` protocol alone.

The same task runs on the engine, on the server, or on anybody's endpoint. No torch here.

    sample.py      what is asked, what came back, how it ended: frozen rows that survive a JSON round trip
    task.py        Task = samples + solver + scorer + metrics
    solvers.py     ways to ask: generate, likelihood of choices, rolling likelihood, an agent with tools
    scorers.py     ways to judge: keywords, numbers, likelihoods, checks
    tasks.py       the kinds of task, one row each, and their JSONL formats
    statistics.py  estimates with intervals; paired differences
    runner.py      bounded concurrency, one counted status per sample, resumable
    contamination.py  which samples stand in the training data, by the lineage
    compare.py     several logs -> one table
    run.py         EvalConfig and `run`, the verb
"""
