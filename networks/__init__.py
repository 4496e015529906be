"""Networks on a frozen model, LoRA and its relatives: what is trained, saved and applied.

New ones, and those in files, for any family of models:
- module: the modules that --network_module may name, what they must offer, and the calls of a training run
- lora_lumina, lora_kandinsky5: what --network_module names for a family
- family_lora: what these do: which layers get a LoRA, and of which size
- network_args: how --network_args are declared and parsed
- families/: the layers of each family by the names of all tools, and what --network_args may say of them
- request: what is asked of a new network
- from_file: networks made from files
- fit: whether networks in files fit a model, and what is to be trained

What computes:
- lora: a network as a whole: applied, merged, exported, loaded
- layer: the LoRA of one linear layer, and the layer that carries it
- lora_op: the arithmetic of layers that read one input, as one autograd function
- dora: a trained length for each column or row of a layer's weight
- start: the weights that a LoRA starts from
- lycoris/: the kinds of LyCORIS' networks

Files:
- names: kohya's names of tensors
- file_layers: which layer each tensor of a file belongs to, by the names of many tools
- files: what a file holds, told from its header
- formats: a network's tensors under the names of other tools
"""
