"""The reference: which names each of its pages shows, by family.

``python -m pdoc funcnet`` makes a page of each module that is named here, with its names in this
order under the titles of their families. What is not named is not public.
"""

import sys

PAGES = {
    "funcnet": {
        "The protocol": """
            Layer Loss Optimizer TrainState Pullback LossPullback Params Tree
            """,
        "Linear layers": "linear bilinear embedding embedding_bag",
        "Activations": """
            relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh
            tanhshrink softplus softsign softshrink hardshrink hardsigmoid hardswish hardtanh
            threshold glu softmax log_softmax softmin softmax2d
            """,
        "Convolution": """
            conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d fold unfold
            """,
        "Padding": """
            zero_pad1d zero_pad2d zero_pad3d constant_pad1d constant_pad2d constant_pad3d
            reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
            replication_pad3d circular_pad1d circular_pad2d circular_pad3d
            """,
        "Pooling": """
            max_pool1d max_pool2d max_pool3d max_unpool1d max_unpool2d max_unpool3d
            avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d
            adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
            fractional_max_pool2d fractional_max_pool3d
            """,
        "Images of another size": """
            interpolate upsample upsampling_nearest2d upsampling_bilinear2d pixel_shuffle
            pixel_unshuffle channel_shuffle
            """,
        "Normalization": """
            batch_norm layer_norm rms_norm group_norm instance_norm instance_norm1d instance_norm2d
            instance_norm3d local_response_norm cross_map_lrn weight_norm spectral_norm
            """,
        "Noise": """
            dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout drop_path
            gaussian_noise
            """,
        "Attention and transformers": """
            scaled_dot_product_attention multihead_attention transformer transformer_encoder
            transformer_encoder_layer transformer_decoder transformer_decoder_layer
            """,
        "Positions in a sequence": """
            learned_positions sinusoidal_positions rotary rotate alibi alibi_bias
            """,
        "Recurrent layers": "rnn gru lstm rnn_cell gru_cell lstm_cell",
        "Shapes and tuples": """
            identity flatten unflatten reshape permute select split concat item fan_out add multiply
            cosine_similarity pairwise_distance
            """,
        "Combinators": """
            serial parallel branch residual shared repeat stacked experts tie freeze cast lora remat
            checkpointed reparametrize
            """,
        "Memory of the backward pass": "reversible compressed",
        "Loss functions": """
            mse mae huber smooth_l1 cross_entropy nll bce bce_with_logits focal kl_div gaussian_nll
            poisson_nll hinge soft_margin margin_ranking multi_margin multilabel_margin
            multilabel_soft_margin hinge_embedding cosine_embedding triplet_margin
            triplet_margin_with_distance ctc
            """,
        "Losses that learn": "adaptive_log_softmax linear_cross_entropy",
        "Optimizers by name": """
            sgd adam adamw adamax nadam radam adagrad adadelta adafactor rmsprop rprop asgd lbfgs
            lion lamb lars signsgd muon shampoo soap sophia schedule_free schedule_free_adamw
            schedule_free_sgd chain apply_updates
            """,
        "Training": """
            train_step init_train_state value_and_grad fit evaluate batches epoch_batches
            early_stopping best_so_far detect_nonfinite
            """,
        "The backward pass as a value": """
            Deferred defer gradients map_pullbacks with_pullbacks
            gradient_norm clipped_update clipped_train_step kronecker_factors KroneckerFactors
            kfac kfac_train_step KfacGradients KfacState adapt_damping
            """,
        "Other backward rules": """
            with_rule cotangent reverse_gradient stop_gradient clip_cotangent noise_cotangent
            straight_through feedback_alignment sign_symmetric guided_backprop deconvnet
            """,
        "Higher derivatives": "jvp hvp",
        "Gradients of single examples, and privacy": """
            defer_examples example_gradients example_norms weighted private_value_and_grad
            private_epsilon private_noise poisson_batch poisson_capacity PoissonBatch
            """,
        "Saving and loading": "save load",
        "Transformations": "jit vmap",
        "Layers that solve equations": "fixed_point neural_ode solver_figures",
        "Control flow": "scan fori while_loop cond switch",
        "Parts of a tensor": """
            dynamic_slice dynamic_slice_in_dim dynamic_update_slice dynamic_update_slice_in_dim
            """,
        "Printing inside a compiled program": "debug_print",
        "Keys of random numbers": "key fold_in",
        "Layers and combinators of one's own": """
            elementwise parameterless stateless stateful declare Param State combine map_layers
            sum_cotangents wrap pull barrier defers for_dx
            """,
        "Looking into a model": "summary observe",
        "Further pages": """
            losses optimizers schedules metrics random initializers tree checkpoint interop
            distributed testing
            """,
    },
    "funcnet.losses": {
        "What a net computes beside its output": "auxiliary",
        "Losses of one's own": "pointwise from_formulas loss_of Elements",
    },
    "funcnet.optimizers": {
        "Transforms of gradients": """
            scale scale_by_learning_rate negate add_decayed_weights trace ema add_noise centralize
            zero_nans set_to_zero
            """,
        "Clipping": """
            clip clip_by_global_norm clip_by_block_rms adaptive_grad_clip normalize
            """,
        "The parts of the named optimizers": """
            scale_by_adam scale_by_adamax scale_by_nadam scale_by_radam scale_by_rms
            scale_by_adagrad scale_by_adadelta scale_by_factored_rms scale_by_rprop scale_by_sign
            scale_by_lion scale_by_trust_ratio scale_by_muon orthogonalize scale_by_shampoo
            scale_by_soap scale_by_sophia refresh_hessian hutchinson gauss_newton_bartlett
            """,
        "Averages of params": """
            params_ema params_average average_asgd average_schedule_free eval_params
            """,
        "Optimizers around others": """
            masked partition accumulate apply_if_finite lookahead dynamic_loss_scale
            inject_hyperparams
            """,
        "Optimizers of one's own": "stateful stateless around zero_step Minimizer",
        "What optimizers keep": """
            AccumulateState AdadeltaState AdagradState AdamState AdamaxState ApplyIfFiniteState
            AsgdState AveragedParamsState EmaState FactoredState InjectHyperparamsState LbfgsState
            LionState LookaheadState LossScaleState MuonState NadamState NoiseState RadamState
            RmsState RpropState ScheduleFreeState ScheduleState ShampooState SoapState SophiaState
            TraceState
            """,
        "Numbers that change": "schedules",
    },
    "funcnet.optimizers.schedules": {
        "One formula": """
            constant linear polynomial exponential step multistep multiplicative cosine cosine_decay
            """,
        "Warm-up and decay": """
            warmup_constant warmup_cosine warmup_exponential warmup_stable_decay inverse_sqrt sgdr
            """,
        "Cycles": "cosine_restarts cyclic cyclic_momentum one_cycle one_cycle_momentum",
        "Several as one": """
            join product piecewise piecewise_constant piecewise_interpolate
            """,
        "By a value": "reduce_on_plateau Plateau PlateauState",
        "The type": "Schedule",
    },
    "funcnet.metrics": {
        "Of classes": """
            accuracy top_k_accuracy confusion_matrix precision recall f1 fbeta auroc
            """,
        "Of numbers": "mean_squared_error mean_absolute_error r2 perplexity mean",
        "Metrics of one's own": "Metric summed masked",
    },
    "funcnet.random": {
        "The keys": "key split fold_in",
        "Draws": """
            bits uniform normal truncated_normal bernoulli randint permutation categorical
            """,
    },
    "funcnet.initializers": {
        "Of one number": "zeros ones",
        "Of given size": "constant uniform normal truncated_normal",
        "By the size of the layer": """
            lecun_uniform lecun_normal glorot_uniform glorot_normal he_uniform he_normal
            xavier_uniform xavier_normal kaiming_uniform kaiming_normal variance_scaling orthogonal
            torch_linear torch_default
            """,
        "What they are made of": "Initializer gain fans",
    },
    "funcnet.tree": {
        "Leaves": "map leaves flatten to_meta",
        "Dotted paths": "to_dotted from_dotted paths path_string merge partition",
        "Chosen leaves": "select replace leaf_at Where",
        "Sizes and norms": "count bytes norms global_norm",
        "Trees beside each other": "compare check_same_structure",
        "What the library itself needs": """
            alike describe device_of placeholder chosen_leaves named_paths selector leaves_like
            Flattener
            """,
    },
    "funcnet.checkpoint": {
        "One file": "save load",
        "A folder of a run": "save_step latest best steps run_folder RunFolder",
    },
    "funcnet.interop": {
        "Modules": "from_module to_module from_state_dict to_state_dict export",
        "Functions": "autodiff",
        "Arrays": "from_numpy to_numpy from_dlpack to_dlpack",
    },
    "funcnet.distributed": {
        "Processes and their mesh": "initialize finalize mesh axis_of",
        "Faults": "PeerError check_same",
        "Parts of a batch, and what is of all of it": "part mean sum total everywhere replicated",
        "The same numbers on any number of ranks": "data_parallel BatchAxis",
        "Params and optimizers in parts": """
            zero sharded over_parts placements state_placements ZeroState
            """,
        "Layers in parts": """
            column_linear row_linear parallel_attention parallel_encoder_layer own_tokens
            parted_dropout vocabulary_embedding vocabulary_cross_entropy
            """,
        "Pipelines": """
            pipeline_step pipeline_state pipeline_evaluate pipeline_stages gpipe one_f_one_b
            zero_bubble simulate Simulation Action
            """,
        "Checkpoints": "save load save_step latest run_folder export",
        "What a layout takes, before it runs": """
            plan plans Plan Plans Layout Stage Memory Traffic Network Link Device link_of
            """,
    },
    "funcnet.testing": {
        "The laws": "check_layer check_loss check_optimizer",
    },
}


def _linked(name: str) -> str:
    """The full name of a page, which alone is a link to it; another name as it is."""
    return next((page for page in PAGES if page.rpartition(".")[2] == name), name)


def names(page: str) -> list[str]:
    """The names that a page shows, in its order: the page's ``__all__``."""
    return " ".join(PAGES[page].values()).split()


def described(page: str, docstring: str | None) -> str:
    """The docstring of a page, followed by an index of its names.

    What it includes, by a path relative to the page's file, is for pdoc: the style of the pages.
    """
    depth = page.count(".") if hasattr(sys.modules[page], "__path__") else page.count(".") - 1
    lines = [docstring or ""]
    for title, listed in PAGES[page].items():
        lines += [f"## {title}", " ".join(f"`{_linked(name)}`" for name in listed.split()), ""]
    return "\n".join([*lines, f".. include:: {'../' * depth}reference.html"])
