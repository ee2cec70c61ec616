"""How learned tokens and learned prefixes get into a base model's forward.

call            the learned prompt of a call: which rows have which, and how long
soft_prompts    learned tokens in front of the text: embeddings, masks, positions, labels
attention/      a learned prefix as a second source of keys and values beside the text's

What is learned, and its files, are in tuners and checkpoint.
"""
