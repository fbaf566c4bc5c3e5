"""Speech in any language to IPA phones: Zipformer encoder, CTC and consistency-regularised CTC."""
