# Several cards, uploads, masks from transparent pictures: flags of a rented machine.
accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 --num_cpu_threads_per_process 4 \
  lumina_train_network.py --config_file run.toml --learning_rate 3e-4 --ddp_gradient_as_bucket_view \
  --ddp_static_graph --fused_backward_pass --async_upload --save_state_to_huggingface --masked_loss --alpha_mask \
  --lr_scheduler cosine --optimizer_type Adafactor --no_metadata
