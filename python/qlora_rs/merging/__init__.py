"""W + scaling B A → NF4 again, so that the merged model behaves like the unmerged one.

Rounding the sum to nearest, as other tools do, mostly gives W back: the update is smaller than
half a step of the grid. Here the codes are chosen by what they do to the layer's outputs.

    adapted.py      layers with an adapter, ours and peft's: the weights that are wanted
    statistics.py   one pass over calibration text: XᵀX of each layer's inputs
    importance.py   which tokens matter, from a backward pass over some of the text
    coupling.py     how errors of a layer's outputs add up, from the same backward pass
    solve.py        one layer: target + statistics -> codes and scales (Rust: rust/merge.rs)
    unbiased.py     solved twice: what the first solution takes from the update is given back
    distill.py      all block scales, trained for some steps towards the unmerged model's logits
    evaluate.py     KL to the unmerged model, agreement, loss, error of each layer
    report.py       what it cost, as JSON, table and picture; the guard
    model.py        merge_model and unmerge: all of it, in place
"""
