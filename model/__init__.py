"""The network: configuration, weights, MLA, MoE, MTP, rope, latent KV cache, sampler, tokenizer."""
