"""Operations on what a bank knows, which the gateway carries out."""
