"""Tensor parallelism: layers whose weights are parted over ranks, with the collectives in rules.

- `parting.py`: how a rank makes its part of a parameter, and keeps padding zero
- `linears.py`: linear layers whose weights are parted by rows or by columns
- `vocabulary.py`: the embedding of a vocabulary, and the cross entropy of logits, parted by tokens
- `heads.py`: attention, each rank with some of the heads
- `blocks.py`: the layer of a Transformer

Source: Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022 for sequences that are parted.
"""
