"""What several adapters share: folded weights and their integers, files that carry plans, proof by outputs."""
