"""The quick start of bertdistiller 0.1.1's README (Apache-2.0): other imports and data, and the
argument it forgets.
"""

from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from scaledistill import MiniLMTrainer, MiniLMTrainingArguments, create_student, prepare_dataset

tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
texts = Dataset.from_dict({"text": [f"w{i % 190:03} w{i % 7:03} w{i % 11:03}" for i in range(600)]})
train_dataset = prepare_dataset([texts], tokenizer, max_seq_len=16)
eval_dataset = train_dataset.select(range(20))
data_collator = DataCollatorWithPadding(tokenizer)

# 1. Create configuration
args = MiniLMTrainingArguments(
    teacher_layer=12,                # Which teacher layer to transfer from
    student_layer=6,                 # Number of layers in student model
    student_hidden_size=384,         # Hidden size of student model
    student_attention_heads=12,
    num_relation_heads=48,           # Number of relation heads for distillation
    relations={(1,1): 1.0, (2,2): 1.0, (3,3): 1.0},  # Q-Q, K-K, V-V relations

    # Training parameters
    output_dir="./output",
    per_device_train_batch_size=256,
    learning_rate=6e-4,
    max_steps=400_000,
)

# 2. Create models & trainer
teacher = AutoModel.from_pretrained("google-bert/bert-base-uncased")
student = create_student("google-bert/bert-base-uncased", args)

trainer = MiniLMTrainer(
    args=args,
    teacher_model=teacher,
    model=student,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    data_collator=data_collator,
)

# 3. Train and save
trainer.train()
student.save_pretrained("./distilled-model")
