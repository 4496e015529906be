"""The networks: one a file, with its file formats.

A family of models
- lumina2: loading, and velocity in the house convention; nextdit is the network
- kandinsky5: the same; kandinsky5_dit is the network, kandinsky5_text and _prompt what it is told,
  kandinsky5_data what of a dataset it cannot take
- *_files: all weight files of a family together; *_identity: what caches and states know them by

Encoders, which know of no family
- flux_vae: pictures to latents, and back
- gemma2: the text encoder of Lumina
- qwen2_5_vl, clip_text: those of Kandinsky; qwen_grid, qwen_picture: a picture to be edited, as Qwen sees it
- *_tokenizer: text to tokens

Files
- *_format: which layout a file has, which sizes, which tensor is which; no torch
- transformer_loading: from files into a network, with what all families have in common
- checkpoint_kind: what a wrong file seems to be; checkpoint_sizes, model_config: how large its network is
- quant_file: quantised files; file_identity: which have the same content; tokenizer_files: where they lie
"""
