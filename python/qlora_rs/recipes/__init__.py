"""Recipes: fine-tuning, generation and the demonstration, thin over trl and transformers.

Read in the order a training line travels:

    data.py          JSONL lines -> checked examples
    encode.py        examples -> token ids and labels (loss on answers only)
    base_model.py    a model directory or .gguf file -> model and tokenizer
    settings.py      every option of a run, checked once
    output_folder.py what a run may write, and where; files are replaced atomically
    trainer.py       trl's SFTTrainer with our loss and our checkpoints
    checkpoint.py    a training checkpoint: complete or absent, never unpickled
    run_callback.py  progress and log beside the training loop
    progress.py      one live line, time left, Ctrl-C
    run_identity.py  what must be equal for a run to be resumed
    finetune.py      all of the above in order
    report.py        loss curve and summary
    generate.py      batched greedy answers
    calendar_dates.py, scores.py, memory_peer.py, demo.py    the demonstration
    quantized_folder.py                     NF4 checkpoints on disk
    merge_text.py, merge_store.py, merge_page.py, merge.py    `qlora-rs merge`
    doctor.py        versions, CPU path, GPU, self-test
    gpu_report.py    what the CUDA kernels need and what adds it

Nothing here is imported by ``import qlora_rs``; it needs ``pip install "qlora_rs[train]"``.
"""
