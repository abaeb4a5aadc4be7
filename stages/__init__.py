"""What is computed: one folder a stage, and the contract in which they meet. No Ray and no scheduling here."""
