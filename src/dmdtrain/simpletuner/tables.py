"""What SimpleTuner's settings are here, as tables.

A key of `distillation_config` is written `distillation_config.KEY`, a key of a dataset `dataset.KEY`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

DISTILLATION = "distillation_config."
DATASET = "dataset."

# theirs -> ours, where the value means the same. What else there is to say stands in NOTES.
COPY: dict[str, tuple[str, ...]] = {
    "distillation_config.generator_update_interval": ("dmd.generator_update_interval",),
    "distillation_config.real_score_guidance_scale": ("dmd.real_score_guidance_scale",),
    "distillation_config.fake_score_guidance_scale": ("dmd.fake_score_guidance_scale",),
    "distillation_config.min_timestep_ratio": ("dmd.min_timestep_ratio",),
    "distillation_config.max_timestep_ratio": ("dmd.max_timestep_ratio",),
    "distillation_config.timestep_shift": ("dmd.timestep_shift",),
    "distillation_config.ts_schedule": ("dmd.ts_schedule",),
    "distillation_config.ts_schedule_max": ("dmd.ts_schedule_max",),
    "distillation_config.min_score_timestep": ("dmd.min_score_timestep",),
    "distillation_config.fake_score_lr": ("fake_score.lr",),
    "distillation_config.fake_score_weight_decay": ("fake_score.weight_decay",),
    "distillation_config.fake_score_betas": ("fake_score.betas",),
    "distillation_config.fake_score_eps": ("fake_score.eps",),
    "distillation_config.fake_score_grad_clip": ("fake_score.grad_clip",),
    "distillation_config.num_training_frames": ("rollout.num_training_frames",),
    "distillation_config.num_frame_per_block": ("rollout.num_frame_per_block",),
    "distillation_config.independent_first_frame": ("rollout.independent_first_frame",),
    "distillation_config.same_step_across_blocks": ("rollout.same_step_across_blocks",),
    "distillation_config.last_step_only": ("rollout.last_step_only",),
    "distillation_config.context_noise": ("rollout.context_noise",),
    "flow_schedule_shift": ("model.flow_shift",),
    "lora_rank": ("student.rank", "fake_score.rank"),
    "lora_alpha": ("student.alpha", "fake_score.alpha"),
    "learning_rate": ("optimizer.lr",),
    "max_grad_norm": ("optimizer.grad_clip",),
    "grad_clip_method": ("optimizer.grad_clip_method",),
    "lr_warmup_steps": ("schedule.warmup_steps",),
    "max_train_steps": ("train.max_steps",),
    "train_batch_size": ("train.batch_size",),
    "gradient_accumulation_steps": ("train.gradient_accumulation",),
    "gradient_checkpointing": ("train.gradient_checkpointing",),
    "mixed_precision": ("train.mixed_precision",),
    "seed": ("train.seed",),
    "ema_decay": ("ema.decay",),
    "ema_update_interval": ("ema.every",),
    "checkpoint_step_interval": ("checkpoint.every",),
    "checkpoints_total_limit": ("checkpoint.keep",),
    "validation_step_interval": ("validation.every",),
    "validation_guidance": ("validation.guidance_scale",),
    "validation_negative_prompt": ("data.negative_prompt", "validation.negative_prompt"),
    "validation_num_video_frames": ("validation.num_frames",),
    "validation_resolution": ("validation.resolution",),
    "validation_seed": ("validation.seed",),
    "framerate": ("validation.fps",),
    "caption_dropout_probability": ("data.caption_dropout",),
    "tokenizer_max_length": ("data.max_sequence_length",),
    "output_dir": ("output_dir",),
    "aspect_bucket_rounding": ("data.aspect_bucket_rounding",),
    "compress_disk_cache": ("data.cache_compress",),
}

# Numbers that are not in COPY, and texts that may be the words true and false.
NUMBERS = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "optimizer_beta1", "optimizer_beta2", "lr_end"),
    *(
        "num_processes",
        "context_parallel_size",
        "ema_warmup_steps",
        "resolution",
        "minimum_image_size",
        "num_train_epochs",
        "lora_dropout",
    ),
    *(f"dataset.{key}" for key in ("resolution", "minimum_image_size", "repeats", "probability")),
)
TEXTS = ("validation_prompt", "validation_negative_prompt", "instance_prompt")

# Older names of theirs.
ALIASES = {
    "checkpointing_steps": "checkpoint_step_interval",
    "validation_steps": "validation_step_interval",
    "validation_num_frames": "validation_num_video_frames",
    "rank": "lora_rank",
    "validation_prompts": "validation_prompt",
}

# Settings of the rollout in blocks, which a bidirectional student has not.
BLOCKS = ("num_frame_per_block", "independent_first_frame", "same_step_across_blocks", "context_noise")

NOTES = {
    "model.flow_shift": "of the teacher's own sampling; neither dmd.denoising_steps nor dmd.timestep_shift goes through it",
    "fake_score.rank": "SimpleTuner trains a full copy; here an adapter on the shared base, unless fake_score.kind: full",
    "data.negative_prompt": "the teacher's unconditional pass needs it in training too",
}


class Choice(NamedTuple):
    """A setting whose values have other names here."""

    ours: tuple[str, ...]
    values: dict[Any, Any]
    otherwise: str


PRECISIONS = {
    "no_change": "bf16",
    "bf16": "bf16",
    "fp32": "fp32",
    "int8-quanto": "int8",
    "int8-torchao": "int8",
    "int8-sdnq": "int8",
    "nf4-bnb": "nf4",
}
PRECISION_HELP = "valid here are bf16, fp32, int8, int8-llm, nf4: set it in the YAML"

CHOICES: dict[str, Choice] = {
    "base_model_precision": Choice(("model.precision",), PRECISIONS, PRECISION_HELP),
    "text_encoder_1_precision": Choice(("model.text_encoder_precision",), PRECISIONS, PRECISION_HELP),
    "quantize_via": Choice(
        ("model.quantize_via",), {"cpu": "cpu", "accelerator": "device"}, "valid here are cpu, device"
    ),
    "attention_mechanism": Choice(
        ("model.attention",),
        {
            "diffusers": "auto",
            "xformers": "xformers",
            "flash-attn": "flash",
            "flash-attn-2": "flash",
            "flash-attn-3": "_flash_3",
            "flash-attn-3-hub": "_flash_3_hub",
            "flash-attn-3-varlen": "_flash_varlen_3",
            "flex": "flex",
            "cudnn": "_native_cudnn",
            "native-efficient": "_native_efficient",
            "native-flash": "_native_flash",
            "native-math": "_native_math",
        },
        "not for training; auto holds: set model.attention to another backend of Diffusers",
    ),
    "lr_scheduler": Choice(
        ("schedule.name",),
        {
            "constant": "constant",
            "constant_with_warmup": "constant",
            "linear": "linear",
            "cosine_with_min_lr": "cosine_with_min_lr",
        },
        "valid here are constant, linear, cosine_with_min_lr (which falls once, to schedule.min_lr)",
    ),
    "model_type": Choice(("student.kind",), {"lora": "lora", "full": "full"}, "valid here are lora, full"),
    "ema_validation": Choice(
        ("ema.validate_with",), {"ema_only": "ema", "comparison": "both", "none": "raw"}, "valid are ema, raw, both"
    ),
}


class AdamW(NamedTuple):
    """An optimizer: its name here, and the settings that it has in SimpleTuner unless told otherwise."""

    name: str
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01


OPTIMIZERS = {
    "adamw": AdamW("adamw", eps=1e-8),
    "torch-adamw": AdamW("adamw", eps=1e-8),
    "bnb-adamw": AdamW("adamw"),
    "adamw_bf16": AdamW("adamw_bf16"),
    "optimi-adamw": AdamW("adamw_bf16", betas=(0.9, 0.99), weight_decay=0.0),
    "bnb-adamw8bit": AdamW("adamw8bit"),
    "ao-adamw8bit": AdamW("adamw8bit"),
    "bnb-adamw8bit-paged": AdamW("paged_adamw8bit"),
}
OPTIMIZER_HELP = "valid here are adamw, adamw_bf16, adamw8bit, paged_adamw8bit: choose one, and its learning rate"

# What holds in SimpleTuner where a key is not set, and is not our default.
THEIR_DEFAULTS: dict[str, Any] = {
    "learning_rate": 4e-7,
    "lora_rank": 16,
    "optimizer": "adamw_bf16",
    "model_type": "full",
    "grad_clip_method": "value",
    "max_grad_norm": 2.0,
    "train_batch_size": 4,
    "caption_dropout_probability": 0.1,
    "use_ema": False,
    "ema_decay": 0.995,
    "ema_validation": "comparison",
    "checkpoint_step_interval": 500,
    "checkpoints_total_limit": 5,
    "validation_step_interval": 100,
    "quantize_via": "accelerator",
}

# Published weights that make video from text, by their name for them.
FLAVOURS = {
    "t2v-480p-1.3b-2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "t2v-480p-14b-2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "ti2v-5b-2.2": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}

# Values that are no choice here: the key, the values that agree with what is done anyway, and what to do about others.
AGREE: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora_type": (("standard",), "only standard LoRA is trained here: choose it, or another trainer"),
    "peft_lora_mode": (("standard",), "only standard LoRA is trained here"),
    "lora_dropout": ((0, 0.0), "adapters have no dropout here: the student would not be what the fake score follows"),
    "lora_init_type": (("default", "true", True), "adapters start as PEFT does it by default: b is zero"),
    "use_dora": ((False,), "only standard LoRA is trained here"),
    "init_lora": ((False, ""), "a student can not start from a LoRA here: merge it into the base folder first"),
    "fuse_qkv_projections": ((False,), "adapters address to_q, to_k and to_v apart"),
    "loss_type": (("l2",), "the losses of DMD are fixed"),
    "prediction_type": (("flow_matching", "epsilon", ""), "Wan predicts a flow"),
    "train_text_encoder": ((False,), "the text encoder stays as it is"),
    "controlnet": ((False,), "not for a few-step student"),
    "control": ((False,), "not for a few-step student"),
    "resolution_type": (("pixel_area", "pixel", "area"), "valid are pixel_area, pixel, area"),
    "model_flavour": (tuple(FLAVOURS), "only text-to-video of Wan 2.1 and of Wan 2.2 5B can be distilled"),
    "prepend_instance_prompt": ((False,), "write the words into the captions"),
    "only_instance_prompt": ((False,), "set caption_strategy: instanceprompt"),
    "distillation_config.simulate_generator_forward": ((True,), "the rollout is always simulated, as the student runs"),
    "distillation_config.fake_score_use_ema": ((False,), "the fake score has no average; the student has"),
    "distillation_config.adversarial_weight": ((0, 0.0), "there is no adversarial loss here"),
    "distillation_config.fake_score_lr_scheduler": (
        ("constant",),
        "the fake score's rate is constant: set fake_score.lr",
    ),
    "distillation_config.min_lr_ratio": ((), "set schedule.min_lr, a learning rate, for the student"),
    "distillation_config.shift": ((), "set dmd.timestep_shift (score timesteps) or model.flow_shift (the teacher's)"),
    "dataset.type": (("local",), "videos are read from a local folder: download them first"),
    "dataset.conditioning": ((), "a text-to-video student takes no other condition"),
    "dataset.conditioning_data": ((), "a text-to-video student takes no other condition"),
    "dataset.conditioning_type": ((), "a text-to-video student takes no other condition"),
    "dataset.is_regularisation_data": ((False,), "there is no regularisation data here"),
    "dataset.is_regularization_data": ((False,), "there is no regularisation data here"),
    "dataset.prepend_instance_prompt": ((False,), "write the words into the captions"),
    "dataset.only_instance_prompt": ((False,), "set caption_strategy: instanceprompt"),
    "dataset.caption_shuffle": ((False,), "captions are taken as they are"),
    "dataset.caption_filter_list": ((), "filter the prompts file"),
    "dataset.video.is_i2v": ((False,), "only text-to-video can be distilled"),
}

# Keys that have no meaning here (shell patterns), and why. The first that fits holds.
NO_MEANING: list[tuple[str, str]] = [
    (
        """push_* hub_* publishing_config model_card_* modelspec_comment post_*_script""",
        "hub.model_id says what is uploaded, with a model card of dmdtrain's own",
    ),
    (
        """tracker_* custom_tracker webhook_* logging_dir merge_environment_config""",
        "metrics go to OUTPUT_DIR/metrics.jsonl, TensorBoard, log.wandb and log.webhook",
    ),
    ("""lora_format""", "export-lora writes Wan's own names, which all read, or --format diffusers"),
    (
        """ignore_final_epochs strict_epoch_limit lr_num_cycles lr_power""",
        "train.max_steps and schedule decide",
    ),
    (
        """cache_* text_cache_* text_embed_* preserve_data_backend_cache write_batch_size
        read_batch_size text_encoder_batch_size fully_unload_text_encoder keep_vae_loaded""",
        "embeddings and latents are kept in data.cache_dir; text encoder and codec are not resident",
    ),
    (
        """delete_* disable_bucket_pruning allow_dataset_oversubscription skip_file_discovery data_backend_sampling
        aspect_bucket_alignment aspect_bucket_disable_* image_processing_*
        metadata_update_interval dataloader_* max_workers *nsfw* ignore_missing_files
        override_dataset_config conditioning_multidataset_sampling enable_multiprocessing aws_* max_upscale_threshold
        maximum_image_size target_downsample_size disable_multiline_split caption_strategy""",
        "data sets are read as they are; nothing of a user's is deleted",
    ),
    ("""vae_*""", "clips are encoded one at a time, videos decoded block by block"),
    ("""disable_benchmark benchmark_*""", "`validate --compare-teacher` renders the teacher beside the student"),
    (
        """offload_* *group_offload* ramtorch* musubi_* accelerator_cache_clear_interval gradient_checkpointing_*
        unet_attention_slice set_grads_to_none fuse_optimizer optimizer_cpu_offload_method optimizer_offload_gradients
        optimizer_release_gradients ema_device ema_cpu_only ema_foreach_disable""",
        "`dmdtrain plan` says what a run needs and what makes it fit",
    ),
    (
        """num_machines machine_rank main_process_* same_network local_rank accelerate_* context_parallel_*
        fsdp_* deepspeed_* dynamo_* find_unused_parameters disable_tf32 torch_num_threads seed_for_each_device
        gradient_precision base_model_default_dtype i_know_what_i_am_doing configs_dir trust_remote_code revision variant
        print_* debug_*""",
        "a matter of how it is launched there",
    ),
    (
        """validation_preview* validation_image_* validation_method validation_external_* validation_adapter_*
        validation_on_startup validation_randomize validation_multigpu validation_seed_source validation_noise_scheduler
        validation_lycoris_strength validation_stitch_* validation_using_datasets validation_input
        validation_disable_unconditional validation_guidance_* validation_no_cfg_* validation_epoch_interval
        num_validation_* num_eval_images eval_* evaluation_type pretrained_evaluation_* validate_after_* enable_watermark""",
        "validation renders fixed prompts from fixed seeds with the student's own sampler",
    ),
    ("""checkpoint* disk_low_*""", "checkpoints are whole, checked, and replaced only by a newer one"),
    (
        """flow_* inference_scheduler_* training_scheduler_* timestep_bias_* snr_* soft_min_snr* use_soft_min_snr
        noise_offset* offset_noise input_perturbation* huber_* rescale_betas_* masked_loss_*
        disable_segmented_timestep_sampling""",
        "the noise levels of DMD are dmd's: denoising_steps, timestep_shift, ts_schedule",
    ),
    (
        """freeze_* layer_freeze_strategy text_encoder_* save_text_encoder t5_padding data_aesthetic_score
        instance_prompt parquet_* audio_* pretrained_gemma_* qwen_* prodigy_steps""",
        "not for Wan, or not for DMD",
    ),
    (
        """dataset.id dataset.default dataset.disabled dataset.dataset_type dataset.text_embeds dataset.image_embeds
        dataset.instance_prompt dataset.disable_multiline_split dataset.parquet* dataset.huggingface* dataset.csv*
        dataset.*_batch_size dataset.vae_cache_* dataset.text_* dataset.preserve_* dataset.hash_filenames
        dataset.skip_file_discovery dataset.scan_for_errors dataset.metadata_* dataset.image_processing_*
        dataset.delete_* dataset.dataset_name dataset.start_* dataset.end_* dataset.disable_validation
        dataset.source_dataset_id dataset.max_workers dataset.shuffle dataset.timestep_sampling_offset
        dataset.slider_strength dataset.audio* dataset.s2v_* dataset.webshart* dataset.aws_* dataset.*nsfw*""",
        "what a dataset has of its own is its folder, its captions and its sizes",
    ),
]

# Other ways to train (shell patterns). A switch that is off has no meaning; on, the run would not be what was asked for.
SWITCHES = """*_enabled refiner_training slider_lora_target tread_config diffusion_blocks_config quantize_activations
    sla_config quantization_config scheduled_sampling_max_step_offset max_grounding_entities assistant_lora_path
    controlnet_model_name_or_path controlnet_custom_config init_lokr_norm pretrained_transformer_model_name_or_path
    pretrained_unet_model_name_or_path pretrained_vae_model_name_or_path"""
SWITCHED = """crepa_* urepa_* irepa_* layersync_* xm_* nextlat_* twinflow_* diff2flow_* mixflow_* scheduled_sampling_*
    internal_guidance_* refiner_training_* assistant_lora_* disable_assistant_lora singlora_* lycoris_config sdnq_*
    sageattention_usage validation_internal_guidance_scale pretrained_*_subfolder pretrained_grounding_* init_lora_*
    text_encoder_lr grounding_*"""
